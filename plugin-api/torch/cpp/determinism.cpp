// Whether operations may give other bits each time, and how precise products in fp32 are. Settings of the whole
// process.
#include "guard.h"

#include <ATen/Context.h>

using moeut::guard;

extern "C" {

char* moeut_deterministic(bool is_on) {
  return guard([&] {
    at::globalContext().setDeterministicAlgorithms(is_on, /*warn_only=*/false);
    at::globalContext().setDeterministicCuDNN(is_on);
    // A help for finding reads of memory that nobody wrote; a step of a 244M model took a quarter longer with it.
    at::globalContext().setDeterministicFillUninitializedMemory(false);
  });
}

// Lets matrix products in fp32 round their operands to TF32; says whether they did before.
char* moeut_tf32(bool is_on, bool* was_on) {
  return guard([&] {
    moeut::checked(was_on, "was_on") = at::globalContext().allowTF32CuBLAS();
    at::globalContext().setAllowTF32CuBLAS(is_on);
  });
}

bool moeut_is_deterministic() { return at::globalContext().deterministicAlgorithms(); }

}  // extern "C"
