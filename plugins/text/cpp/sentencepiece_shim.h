// The C face of SentencePiece that `src/sentencepiece.rs` calls. It is not a general binding: only what a
// text dataset needs. Nothing allocated on one side is freed on the other: results leave through sinks,
// which copy. No function lets a C++ exception escape.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

// Receives `len` bytes (ids: `len` integers) that live only during the call.
typedef void (*moeut_byte_sink)(void* state, const char* bytes, std::size_t len);
typedef void (*moeut_id_sink)(void* state, const std::int32_t* ids, std::size_t len);

// Points `text` at the next document and returns 1; returns 0 at the end, and -1 to give up.
// The text must stay valid until the next call.
typedef std::int32_t (*moeut_next_document)(void* state, const char** text, std::size_t* len);

// All functions that can fail return 0, or 1 after having sent a message to the `error` sink.

// The processor, or null.
void* moeut_sp_load(const char* model, std::size_t len, void* error_state, moeut_byte_sink error);
void moeut_sp_free(void* processor);
std::int32_t moeut_sp_vocab_size(const void* processor);

// `id` must be in 0..vocab_size.
std::int32_t moeut_sp_piece(const void* processor, std::int32_t id, float* score, void* state,
                            moeut_byte_sink sink);
std::int32_t moeut_sp_encode(const void* processor, const char* text, std::size_t len, void* state,
                             moeut_id_sink sink, void* error_state, moeut_byte_sink error);
// Every id must be in 0..vocab_size.
std::int32_t moeut_sp_decode(const void* processor, const std::int32_t* ids, std::size_t len,
                             void* state, moeut_byte_sink sink, void* error_state,
                             moeut_byte_sink error);

// Trains with the reference's settings (BPE, digits split). Sends the model file's bytes to `sink`.
std::int32_t moeut_sp_train(std::int32_t vocab_size, void* documents, moeut_next_document next,
                            void* state, moeut_byte_sink sink, void* error_state,
                            moeut_byte_sink error);
}
