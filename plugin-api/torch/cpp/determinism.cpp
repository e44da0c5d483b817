// Whether operations may give other bits each time. A setting of the whole process.
#include "guard.h"

#include <ATen/Context.h>

using moeut::guard;

extern "C" {

char* moeut_deterministic(bool is_on) {
  return guard([&] {
    at::globalContext().setDeterministicAlgorithms(is_on, /*warn_only=*/false);
    at::globalContext().setDeterministicCuDNN(is_on);
  });
}

bool moeut_is_deterministic() { return at::globalContext().deterministicAlgorithms(); }

}  // extern "C"
