//! The program; everything is in the library.

fn main() -> std::process::ExitCode {
    moeut_host::cli::main()
}
