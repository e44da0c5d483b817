// See the header for what this is and what it is not.
#include "sentencepiece_shim.h"

#include <sentencepiece_processor.h>
#include <sentencepiece_trainer.h>

#include <exception>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace {

using sentencepiece::SentencePieceProcessor;
using sentencepiece::util::Status;
using sentencepiece::util::StatusCode;

struct ErrorSink {
  void* state;
  moeut_byte_sink sink;

  std::int32_t say(std::string_view message) const {
    sink(state, message.data(), message.size());
    return 1;
  }
};

// Runs `body`, which returns a Status, and turns a bad status or any exception into a message.
template <typename Body>
std::int32_t guarded(const ErrorSink& error, Body body) {
  try {
    const Status status = body();
    return status.ok() ? 0 : error.say(status.error_message());
  } catch (const std::exception& caught) {
    return error.say(caught.what());
  } catch (...) {
    return error.say("unknown C++ exception");
  }
}

// Pulls documents out of the caller's iterator, one at a time.
class PulledDocuments : public sentencepiece::SentenceIterator {
 public:
  PulledDocuments(void* documents, moeut_next_document next) : documents_(documents), next_(next) {
    Next();
  }
  bool done() const override { return outcome_ != 1; }
  const std::string& value() const override { return current_; }
  Status status() const override {
    return outcome_ < 0 ? Status(StatusCode::kCancelled, "the documents ended with an error")
                        : Status();
  }
  void Next() override {
    const char* text = nullptr;
    std::size_t len = 0;
    outcome_ = next_(documents_, &text, &len);
    if (outcome_ == 1) current_.assign(text, len);
  }

 private:
  void* documents_;
  moeut_next_document next_;
  std::string current_;
  std::int32_t outcome_ = 0;
};

const SentencePieceProcessor& as_processor(const void* processor) {
  return *static_cast<const SentencePieceProcessor*>(processor);
}

}  // namespace

extern "C" {

void* moeut_sp_load(const char* model, std::size_t len, void* error_state, moeut_byte_sink error) {
  std::unique_ptr<SentencePieceProcessor> processor;
  const std::int32_t failed = guarded({error_state, error}, [&] {
    processor = std::make_unique<SentencePieceProcessor>();
    return processor->LoadFromSerializedProto(std::string_view(model, len));
  });
  return failed ? nullptr : processor.release();
}

void moeut_sp_free(void* processor) { delete static_cast<SentencePieceProcessor*>(processor); }

std::int32_t moeut_sp_vocab_size(const void* processor) {
  return as_processor(processor).GetPieceSize();
}

std::int32_t moeut_sp_piece(const void* processor, std::int32_t id, float* score, void* state,
                            moeut_byte_sink sink) {
  // The piece itself is the message, should an exception come: there is nothing else to say about it.
  return guarded({state, sink}, [&] {
    const std::string& piece = as_processor(processor).IdToPiece(id);
    *score = as_processor(processor).GetScore(id);
    sink(state, piece.data(), piece.size());
    return Status();
  });
}

std::int32_t moeut_sp_encode(const void* processor, const char* text, std::size_t len, void* state,
                             moeut_id_sink sink, void* error_state, moeut_byte_sink error) {
  return guarded({error_state, error}, [&] {
    std::vector<int> ids;
    const Status status = as_processor(processor).Encode(std::string_view(text, len), &ids);
    if (status.ok()) sink(state, ids.data(), ids.size());
    return status;
  });
}

std::int32_t moeut_sp_decode(const void* processor, const std::int32_t* ids, std::size_t len,
                             void* state, moeut_byte_sink sink, void* error_state,
                             moeut_byte_sink error) {
  return guarded({error_state, error}, [&] {
    std::string text;
    const std::vector<int> copied(ids, ids + len);
    const Status status = as_processor(processor).Decode(copied, &text);
    if (status.ok()) sink(state, text.data(), text.size());
    return status;
  });
}

std::int32_t moeut_sp_train(std::int32_t vocab_size, void* documents, moeut_next_document next,
                            void* state, moeut_byte_sink sink, void* error_state,
                            moeut_byte_sink error) {
  return guarded({error_state, error}, [&] {
    PulledDocuments pulled(documents, next);
    std::string model;
    // A map, not a command line: the overload for the latter logs the line before it reads the log level.
    // Level 3 keeps the library from writing to standard error; failures come back as a status.
    const std::unordered_map<std::string, std::string> options = {
        {"model_type", "bpe"},
        {"vocab_size", std::to_string(vocab_size)},
        {"split_digits", "true"},
        {"minloglevel", "3"},
    };
    const Status status = sentencepiece::SentencePieceTrainer::Train(options, &pulled, &model);
    if (status.ok()) sink(state, model.data(), model.size());
    return status;
  });
}
}
