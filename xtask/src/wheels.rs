//! The pinned wheels: which files make up `.libtorch`, their checksums, and which of their contents are unpacked.
//!
//! Data only; `setup` acts on it. tch 0.24 accepts libtorch 2.11.0 and nothing else, and torch 2.11.0 names the
//! exact versions of its NVIDIA libraries, so an update of tch is the one reason to edit this table.

/// One wheel of the installation.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wheel {
    /// Project name, as pip spells it; also the name of the stamp.
    pub(crate) name: &'static str,
    /// The exact file. Any `CPython` tag of torch carries the same C++ libraries, so cp311 serves every Python.
    pub(crate) file: &'static str,
    /// SHA-256 of the file, hexadecimal.
    pub(crate) sha256: &'static str,
    /// Prefixes of the members to unpack; empty means all.
    pub(crate) keep: &'static [&'static str],
}

const fn whole(name: &'static str, file: &'static str, sha256: &'static str) -> Wheel {
    Wheel {
        name,
        file,
        sha256,
        keep: &[],
    }
}

/// The version of libtorch.
pub(crate) const LIBTORCH: &str = "2.11.0";

/// libtorch itself.
pub(crate) const TORCH: Wheel = Wheel {
    name: "torch",
    file: "torch-2.11.0-cp311-cp311-manylinux_2_28_x86_64.whl",
    sha256: "7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a",
    keep: &[
        "torch/lib/",
        "torch/include/",
        "torch/share/",
        "torch/version.py",
        "torch-2.11.0.dist-info/",
    ],
};

/// What a build and a CPU run need besides libtorch: the libraries that `libtorch_cpu.so` is linked with, the CUDA
/// headers that the C++ shim includes, and cmake for `sentencepiece-sys`.
pub(crate) const CPU: [Wheel; 4] = [
    whole(
        "nvidia-cuda-runtime",
        "nvidia_cuda_runtime-13.0.96-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548",
    ),
    whole(
        "nvidia-cuda-cupti",
        "nvidia_cuda_cupti-13.0.85-py3-none-manylinux_2_25_x86_64.whl",
        "4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8",
    ),
    whole(
        "nvidia-cuda-crt",
        "nvidia_cuda_crt-13.0.88-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        "2c8043c7c9e02492716426e9919fc78d2c5b3b2a7a768a88e952676b08aa55a4",
    ),
    Wheel {
        name: "cmake",
        file: "cmake-4.4.4-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        sha256: "f773a0544c66370408f451acd487c2c643b0dfebb48c5d64f3638bc1bb820238",
        keep: &[
            "cmake/data/bin/cmake",
            "cmake/data/share/cmake-",
            "cmake-4.4.4.dist-info/",
        ],
    },
];

/// The rest of NVIDIA's run time that `libtorch_cuda.so` is linked with or opens.
pub(crate) const CUDA: [Wheel; 13] = [
    whole(
        "nvidia-cublas",
        "nvidia_cublas-13.1.0.3-py3-none-manylinux_2_27_x86_64.whl",
        "ee8722c1f0145ab246bccb9e452153b5e0515fd094c3678df50b2a0888b8b171",
    ),
    whole(
        "nvidia-cuda-nvrtc",
        "nvidia_cuda_nvrtc-13.0.88-py3-none-manylinux2010_x86_64.manylinux_2_12_x86_64.whl",
        "ad9b6d2ead2435f11cbb6868809d2adeeee302e9bb94bcf0539c7a40d80e8575",
    ),
    whole(
        "nvidia-cudnn-cu13",
        "nvidia_cudnn_cu13-9.19.0.56-py3-none-manylinux_2_27_x86_64.whl",
        "d20e1734305e9d68889a96e3f35094d733ff1f83932ebe462753973e53a572bf",
    ),
    whole(
        "nvidia-cufft",
        "nvidia_cufft-12.0.0.61-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        "6c44f692dce8fd5ffd3e3df134b6cdb9c2f72d99cf40b62c32dde45eea9ddad3",
    ),
    whole(
        "nvidia-cufile",
        "nvidia_cufile-1.15.1.6-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        "08a3ecefae5a01c7f5117351c64f17c7c62efa5fffdbe24fc7d298da19cd0b44",
    ),
    whole(
        "nvidia-curand",
        "nvidia_curand-10.4.0.35-py3-none-manylinux_2_27_x86_64.whl",
        "1aee33a5da6e1db083fe2b90082def8915f30f3248d5896bcec36a579d941bfc",
    ),
    whole(
        "nvidia-cusolver",
        "nvidia_cusolver-12.0.4.66-py3-none-manylinux_2_27_x86_64.whl",
        "0a759da5dea5c0ea10fd307de75cdeb59e7ea4fcb8add0924859b944babf1112",
    ),
    whole(
        "nvidia-cusparse",
        "nvidia_cusparse-12.6.3.3-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        "2b3c89c88d01ee0e477cb7f82ef60a11a4bcd57b6b87c33f789350b59759360b",
    ),
    whole(
        "nvidia-cusparselt-cu13",
        "nvidia_cusparselt_cu13-0.8.0-py3-none-manylinux2014_x86_64.whl",
        "25e30a8a7323935d4ad0340b95a0b69926eee755767e8e0b1cf8dd85b197d3fd",
    ),
    whole(
        "nvidia-nccl-cu13",
        "nvidia_nccl_cu13-2.28.9-py3-none-manylinux_2_18_x86_64.whl",
        "e4553a30f34195f3fa1da02a6da3d6337d28f2003943aa0a3d247bbc25fefc42",
    ),
    whole(
        "nvidia-nvjitlink",
        "nvidia_nvjitlink-13.0.88-py3-none-manylinux2010_x86_64.manylinux_2_12_x86_64.whl",
        "13a74f429e23b921c1109976abefacc69835f2f433ebd323d3946e11d804e47b",
    ),
    whole(
        "nvidia-nvshmem-cu13",
        "nvidia_nvshmem_cu13-3.4.5-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        "290f0a2ee94c9f3687a02502f3b9299a9f9fe826e6d0287ee18482e78d495b80",
    ),
    whole(
        "nvidia-nvtx",
        "nvidia_nvtx-13.0.85-py3-none-manylinux1_x86_64.manylinux_2_5_x86_64.whl",
        "4936d1d6780fbe68db454f5e72a42ff64d1fd6397df9f363ae786930fd5c1cd4",
    ),
];
