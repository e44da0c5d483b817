// Profiles: libtorch's own profiler (Kineto), and spans that appear in what it records.
#include "guard.h"

#include <ATen/record_function.h>
#include <torch/csrc/autograd/profiler_kineto.h>

#include <set>

using moeut::checked;
using moeut::guard;
using torch::profiler::impl::ActivityType;
using torch::profiler::impl::ProfilerConfig;
using torch::profiler::impl::ProfilerState;

namespace {

ProfilerConfig config() { return ProfilerConfig(ProfilerState::KINETO, /*report_input_shapes=*/true); }

std::set<ActivityType> activities(bool with_cuda) {
  std::set<ActivityType> all = {ActivityType::CPU};
  if (with_cuda) all.insert(ActivityType::CUDA);
  return all;
}

}  // namespace

extern "C" {

// Makes ready for `moeut_profiler_start`; on CUDA it takes seconds the first time.
char* moeut_profiler_prepare(bool with_cuda) {
  return guard([&] { torch::autograd::profiler::prepareProfiler(config(), activities(with_cuda)); });
}

// Records what this thread, and the backward passes that it starts, do from now on.
char* moeut_profiler_start(bool with_cuda) {
  return guard([&] { torch::autograd::profiler::enableProfiler(config(), activities(with_cuda)); });
}

// Ends the recording of this thread and writes it to `path`, or nowhere if that is null.
char* moeut_profiler_stop(const char* path) {
  return guard([&] {
    const auto result = torch::autograd::profiler::disableProfiler();
    if (path != nullptr) checked(result.get(), "result").save(path);
  });
}

// Begins a span of this thread; null if nobody records, which is found out in some nanoseconds.
char* moeut_span_begin(const char* name, size_t length, at::RecordFunction** span) {
  return guard([&] {
    checked(span, "span") = nullptr;
    auto callbacks = at::getStepCallbacksUnlessEmpty(at::RecordScope::USER_SCOPE);
    if (!callbacks.has_value()) return;
    auto recorded = std::make_unique<at::RecordFunction>(std::move(*callbacks));
    recorded->before(std::string_view(name, length));
    *span = recorded.release();
  });
}

// On the thread that began it. Its destructor records the end, and catches what a recorder throws.
void moeut_span_end(at::RecordFunction* span) { delete span; }

}  // extern "C"
