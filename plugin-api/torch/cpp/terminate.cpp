// What is said before the process ends because nobody catches an exception.
#include <cstdlib>
#include <exception>

namespace {

using Say = void (*)(const char* what);
Say say_last_words = nullptr;

// The exit code of every error that is told.
constexpr int kExitCode = 2;

[[noreturn]] void end() {
  const char* what = "it has no text";
  try {
    if (auto exception = std::current_exception()) {
      std::rethrow_exception(exception);
    }
    what = "`std::terminate` was called";
  } catch (const std::exception& exception) {
    say_last_words(exception.what());
    std::_Exit(kExitCode);
  } catch (...) {
  }
  say_last_words(what);
  std::_Exit(kExitCode);
}

}  // namespace

extern "C" {

void moeut_on_uncaught(Say say) {
  say_last_words = say;
  std::set_terminate(end);
}

}  // extern "C"
