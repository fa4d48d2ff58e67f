/* The C ABI of the native decoder: the whole forward pass of a llama-like model over packed or 16-bit weights.
 *
 * A model is described by plain structs that point to memory of the caller's: weights of bdk_weight_create, matrices in
 * 16 or 32 bits, gains and biases in fp32.  The structs are copied; what they point to must outlive the decoder.  Every
 * size is checked against the others before anything is computed.
 *
 * A decoder has a key-value cache of `slots` sequences and is driven by one thread at a time.  What a sequence's
 * numbers are does not depend on the sequences beside it, nor on how its prompt is cut.
 */
#ifndef BITDISTILL_DECODER_H
#define BITDISTILL_DECODER_H

#include "bitdistill_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum bdk_value_type { BDK_VALUE_FP32 = 0, BDK_VALUE_FP16 = 1, BDK_VALUE_BF16 = 2 } bdk_value_type;
typedef enum bdk_cache_type { BDK_CACHE_FP16 = 0, BDK_CACHE_INT8 = 1 } bdk_cache_type;
typedef enum bdk_activation { BDK_SILU = 0, BDK_GELU_TANH = 1 } bdk_activation;

/* y = W norm(x) + bias.  W is `packed`, or else `dense` [rows, columns] of value_type. */
typedef struct bdk_linear {
  const bdk_weight* packed;
  const void* dense;
  int32_t value_type;      /* enum bdk_value_type, of `dense` */
  int32_t activation_bits; /* of a packed weight: 0 or 8, as for bdk_matmul */
  int64_t rows;
  int64_t columns;
  const float* bias;      /* [rows], or null */
  const float* norm_gain; /* [columns]: an RMSNorm in front (SubLN), or null */
  float norm_eps;
  int32_t activation_per_group; /* int8 activations have a scale for each group of the weight, not for each token */
} bdk_linear;

/* RMSNorm gains are [hidden], but those of queries and keys [head_size]; they include what the family adds to them. */
typedef struct bdk_layer {
  bdk_linear query, key, value, output, gate, up, down;
  const float* attention_norm;
  const float* ffn_norm;
  const float* attention_out_norm; /* after attention, before it is added; or null */
  const float* ffn_out_norm;       /* the same of the MLP */
  const float* query_norm;         /* of each head, or null */
  const float* key_norm;
  int64_t window; /* positions that a query sees, itself included; 0: all */
  int64_t rope;   /* which of the model's tables */
} bdk_layer;

typedef struct bdk_model {
  int64_t hidden, heads, key_heads, head_size, ffn, vocabulary;
  int64_t layer_count;
  const bdk_layer* layers;
  bdk_linear embedding; /* [vocabulary, hidden]; no bias, no norm */
  bdk_linear head;      /* [vocabulary, hidden] */
  const float* last_norm;
  /* rope_count tables of [positions, head_size / 2] cosines and sines, one after the other */
  const float* cosines;
  const float* sines;
  int64_t rope_count;
  int64_t positions;
  int32_t activation; /* enum bdk_activation */
  float norm_eps;
  float attention_scale;
  float embedding_scale;
  float soft_cap;   /* of the logits; 0: none */
  int32_t reserved; /* 0 */
} bdk_model;

typedef struct bdk_decoder bdk_decoder;

/* A cache of slots x slot_tokens tokens; slot_tokens may not exceed the model's positions. */
BDK_API int bdk_decoder_create(const bdk_model* model, int64_t slots, int64_t slot_tokens, int32_t cache_type,
                               bdk_decoder** decoder);
BDK_API void bdk_decoder_free(bdk_decoder* decoder);
/* Bytes of the key-value cache, and of the room for activations so far. */
BDK_API int64_t bdk_decoder_cache_bytes(const bdk_decoder* decoder);
BDK_API int64_t bdk_decoder_scratch_bytes(const bdk_decoder* decoder);

/* Appends counts[i] tokens to slots[i], whose cache holds starts[i] of them; `ids` holds the tokens of all sequences
 * one after the other.  The logits after the last wanted[i] tokens of each sequence are written to the next rows of
 * `logits` [sum of wanted, vocabulary]. */
BDK_API int bdk_decoder_forward(bdk_decoder* decoder, int64_t sequences, const int64_t* slots, const int64_t* starts,
                                const int64_t* counts, const int64_t* ids, const int64_t* wanted, float* logits);

/* Writes the first `tokens` tokens of one slot's cache over those of another. */
BDK_API int bdk_decoder_copy(bdk_decoder* decoder, int64_t from, int64_t to, int64_t tokens);

#ifdef __cplusplus
}
#endif
#endif
