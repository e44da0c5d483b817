// Lists of tensors: how arguments and results travel between Rust and C++, with no limit on their number.
#include "guard.h"

#include <cstdlib>

using moeut::List;
using moeut::checked;
using moeut::guard;

extern "C" {

char* moeut_list_new(List** list) {
  return guard([&] { checked(list, "list") = new List(); });
}

void moeut_list_free(List* list) { delete list; }

size_t moeut_list_len(const List* list) { return list == nullptr ? 0 : list->size(); }

// A null `tensor` becomes an undefined one, which stands for "no gradient".
char* moeut_list_push(List* list, const at::Tensor* tensor) {
  return guard([&] { checked(list, "list").push_back(tensor == nullptr ? at::Tensor() : *tensor); });
}

// `tensor` receives a new reference to the storage, or null where the list holds an undefined tensor.
char* moeut_list_get(const List* list, size_t index, at::Tensor** tensor) {
  return guard([&] {
    const auto& tensors = checked(list, "list");
    TORCH_CHECK(index < tensors.size(), "index ", index, " in a list of ", tensors.size(), " tensors");
    const auto& found = tensors[index];
    checked(tensor, "tensor") = found.defined() ? new at::Tensor(found) : nullptr;
  });
}

void moeut_error_free(char* error) { std::free(error); }

}  // extern "C"
