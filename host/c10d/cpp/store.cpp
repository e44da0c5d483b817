// The key-value store through which ranks find each other.
#include "c10d.h"

#include <c10/util/Flags.h>

#include <cstdlib>
#include <mutex>

C10_DECLARE_int(caffe2_log_level);

using moeut::Store;
using moeut::Text;
using moeut::checked;
using moeut::guard;
using moeut::milliseconds;

void moeut::print_from(Severity severity) {
  const bool is_chosen =
      std::getenv("TORCH_CPP_LOG_LEVEL") != nullptr || std::getenv("TORCH_DISTRIBUTED_DEBUG") != nullptr;
  if (!is_chosen) FLAGS_caffe2_log_level = severity;
}

namespace {

std::vector<std::string> strings(const Text* texts, size_t n_texts) {
  std::vector<std::string> strings;
  for (size_t i = 0; i < n_texts; ++i) strings.push_back(texts[i].string());
  return strings;
}

}  // namespace

extern "C" {

void moeut_c10d_text_free(char* text) { std::free(text); }

// A server with a known number of ranks waits for them all; a client waits for its server.
char* moeut_c10d_store_tcp(Text host, uint16_t port, bool is_server, const uint64_t* n_ranks, uint64_t timeout_ms,
                           Store** store, uint16_t* bound_port) {
  return guard([&] {
    // Each refused connection while a server starts would be a warning, and an error with its C++ stack in the end. What
    // matters comes back from here.
    static std::once_flag once;
    std::call_once(once, moeut::print_from, moeut::kFatal);
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = is_server;
    options.waitWorkers = n_ranks != nullptr;
    if (n_ranks != nullptr) options.numWorkers = static_cast<size_t>(*n_ranks);
    options.timeout = milliseconds(timeout_ms);
    auto tcp = c10::make_intrusive<c10d::TCPStore>(host.string(), options);
    checked(bound_port, "bound_port") = tcp->getPort();
    checked(store, "store") = new Store{std::move(tcp)};
  });
}

void moeut_c10d_store_free(Store* store) { delete store; }

char* moeut_c10d_store_set(const Store* store, Text key, Text value) {
  return guard([&] {
    const auto* bytes = reinterpret_cast<const uint8_t*>(value.data);
    checked(store, "store").tcp->set(key.string(), std::vector<uint8_t>(bytes, bytes + value.length));
  });
}

// `value` receives `length` bytes that the caller frees as a text. The key has to be there, else this connection waits.
char* moeut_c10d_store_get(const Store* store, Text key, char** value, size_t* length) {
  return guard([&] {
    const auto bytes = checked(store, "store").tcp->get(key.string());
    auto* copy = static_cast<char*>(std::malloc(bytes.size() + 1));
    TORCH_CHECK(copy != nullptr, "no memory for ", bytes.size(), " bytes of `", key.string(), "`");
    std::copy(bytes.begin(), bytes.end(), copy);
    checked(value, "value") = copy;
    checked(length, "length") = bytes.size();
  });
}

// Another connection to the same server.
char* moeut_c10d_store_clone(const Store* store, Store** clone) {
  return guard([&] {
    auto tcp = c10::dynamic_intrusive_pointer_cast<c10d::TCPStore>(checked(store, "store").tcp->clone());
    TORCH_CHECK(tcp, "the clone of a TCP store is none");
    checked(clone, "clone") = new Store{std::move(tcp)};
  });
}

char* moeut_c10d_store_wait(const Store* store, const Text* keys, size_t n_keys, uint64_t timeout_ms) {
  return guard([&] { checked(store, "store").tcp->wait(strings(keys, n_keys), milliseconds(timeout_ms)); });
}

char* moeut_c10d_store_check(const Store* store, const Text* keys, size_t n_keys, bool* has_all) {
  return guard(
      [&] { checked(has_all, "has_all") = checked(store, "store").tcp->check(strings(keys, n_keys)); });
}

char* moeut_c10d_store_add(const Store* store, Text key, int64_t amount, int64_t* sum) {
  return guard([&] { checked(sum, "sum") = checked(store, "store").tcp->add(key.string(), amount); });
}

}  // extern "C"
