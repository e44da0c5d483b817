// The parts of Gloo that c10d's header and our `abort` name; libtorch's wheel carries the code and not the headers.
// Only functions that libtorch_cpu.so exports are declared, no data: the size of these classes is not known here, and
// nothing makes or copies one. The linker checks names and arguments, because C++ spells them out in the symbol; the
// returned types are those of Gloo's own headers.
#pragma once

#include <chrono>
#include <exception>
#include <memory>
#include <string>

namespace gloo {
namespace transport {

class Pair;

namespace tcp {

// Also the base of the TLS transport's pairs; Linux has no transport besides these two.
class Pair {
 public:
  // Ends what waits for this connection with an error of this text, and closes it; returns the error that the pair has
  // from now on. Takes the pair's own lock.
  std::exception_ptr signalExceptionExternal(const std::string& text);
};

}  // namespace tcp
}  // namespace transport

class Context {
 public:
  void setTimeout(std::chrono::milliseconds timeout);

  // The connection to another rank; empty at the own rank's place.
  std::unique_ptr<transport::Pair>& getPair(int rank);
};

}  // namespace gloo
