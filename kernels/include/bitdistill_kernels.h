/* The C ABI of the low-bit CPU kernels: y = x W^T (+ bias) with W packed in 2, 3, 4 or 8 bits.
 *
 * Weights arrive as the canonical bytes of docs/FORMAT.md and are copied into the layout of src/layout.h, so the
 * caller's buffers may be freed after bdk_weight_create.  Every size is checked against the shape before a byte is
 * read.  All functions may be called from any thread; a weight is immutable and may be shared.
 */
#ifndef BITDISTILL_KERNELS_H
#define BITDISTILL_KERNELS_H

#include <stdint.h>

#if defined(_WIN32)
#define BDK_API __declspec(dllexport)
#else
#define BDK_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Bumped when a signature below changes; the Python package refuses another one. */
#define BDK_ABI_VERSION 2

/* Largest number of input features of one matrix: int32 sums of int8 products stay exact up to here. */
#define BDK_MAX_COLUMNS 65536

enum bdk_status {
  BDK_OK = 0,
  BDK_BAD_ARGUMENT = 1, /* a null pointer, a negative count, an unknown enum value */
  BDK_BAD_SHAPE = 2,    /* rows, columns or group size outside what is supported */
  BDK_BAD_SIZE = 3,     /* a buffer whose bytes are not exactly those of the shape */
  BDK_BAD_CODE = 4,     /* a code that the format does not have */
  BDK_NO_MEMORY = 5,
  BDK_UNSUPPORTED = 6 /* an instruction set that this machine or build lacks */
};

enum bdk_format {
  BDK_TERNARY = 0,     /* (code - 1) * scale */
  BDK_INT2 = 1,        /* (code - zero) * scale */
  BDK_INT3 = 2,        /* (code - zero) * scale */
  BDK_NF3 = 3,         /* level[code] * scale of the level's sign */
  BDK_SEQ2 = 4,        /* (code - 1.5) / 2 * scale */
  BDK_SEQ_TERNARY = 5, /* (code - 1) * 2/3 * scale */
  BDK_LSQ3 = 6,        /* (code - 4) * scale */
  BDK_INT4 = 7,        /* (code - zero) * scale */
  BDK_INT8 = 8         /* (code - 128) * scale, code 1..255 */
};

enum bdk_granularity { BDK_PER_TENSOR = 0, BDK_PER_ROW = 1, BDK_PER_GROUP = 2 };

enum bdk_scale_type { BDK_FP16 = 0, BDK_FP32 = 1 };

typedef struct bdk_weight_description {
  int32_t format;      /* enum bdk_format */
  int32_t granularity; /* enum bdk_granularity */
  int32_t scale_type;  /* enum bdk_scale_type */
  int32_t reserved;    /* 0 */
  int64_t rows;        /* N, out features */
  int64_t columns;     /* K, in features */
  int64_t group_size;  /* inputs that share a scale; read for BDK_PER_GROUP only */
  const uint8_t* codes;
  int64_t codes_bytes;
  const void* scales;
  int64_t scales_bytes;
  const uint8_t* zeros; /* null for formats without zero points */
  int64_t zeros_bytes;
} bdk_weight_description;

typedef struct bdk_weight bdk_weight;

BDK_API int bdk_abi_version(void);
BDK_API const char* bdk_status_text(int status);

/* Copies and repacks a weight.  On success *weight is to be given to bdk_weight_free. */
BDK_API int bdk_weight_create(const bdk_weight_description* description, bdk_weight** weight);
BDK_API void bdk_weight_free(bdk_weight* weight);
/* Bytes that the repacked weight occupies. */
BDK_API int64_t bdk_weight_bytes(const bdk_weight* weight);

/* out [count, columns]: the weight's rows `ids` in fp32, each value (level) * scale of docs/FORMAT.md, rounded once.
 * BDK_BAD_ARGUMENT where an id is not a row. */
BDK_API int bdk_weight_rows(const bdk_weight* weight, const int64_t* ids, int64_t count, float* out);

/* y [tokens, N] = x [tokens, K] W^T + bias [N] (or null).  x and y must not overlap.
 *
 * activation_bits 0: fp32 activations; activation_group is 0.
 * activation_bits 8: x is quantised to int8, and all products of a group of the weight are summed exactly.
 *   activation_group 0: one scale a token:   y = (sum over groups of (scale * integer)) * x scale + bias
 *   activation_group the weight's group size (for a weight with a scale per group):
 *     one scale for each group of a token:   y = sum over groups of ((scale * x scale) * integer) + bias
 *   where integer is the sum of the products of the int8 activations with code - zero (in the units of the format).
 *   The result is the same bits on every instruction set and with any number of threads. */
BDK_API int bdk_matmul(const bdk_weight* weight, const float* x, int64_t tokens, const float* bias,
                       int32_t activation_bits, int64_t activation_group, float* y);

/* One of several products of the same x. */
typedef struct bdk_product {
  const bdk_weight* weight;
  const float* bias; /* or null */
  float* y;
} bdk_product;

/* bdk_matmul of several weights with as many columns, such as those of q, k and v.  x is quantised once for all weights
 * with groups alike that follow each other, and the threads share out the rows of those as if they were one weight. */
BDK_API int bdk_matmul_shared(const bdk_product* products, int64_t count, const float* x, int64_t tokens,
                              int32_t activation_bits, int64_t activation_group);

/* The int8 activations that bdk_matmul uses, for each group of `group` columns of a token (0: all of them):
 *   peak = max(max|x|, 1e-5)    scale = peak / 127    q = round half even (x * (127 / peak))
 * A group that holds a NaN or an infinity gets the scale NaN and zeros.  scale [tokens, ceil(columns / group)]. */
BDK_API int bdk_quantize_activation(const float* x, int64_t tokens, int64_t columns, int64_t group, int8_t* q,
                                    float* scale);

/* Instruction sets of this build, best first; names are static strings. */
BDK_API int bdk_instruction_set_count(void);
BDK_API const char* bdk_instruction_set_name(int index);
BDK_API int bdk_instruction_set_available(int index); /* 1 where this machine can run it */
BDK_API int bdk_instruction_set_chosen(void);
BDK_API int bdk_instruction_set_choose(int index);

/* Threads that share the rows of one product (the caller is one of them). */
BDK_API int bdk_threads(void);
BDK_API int bdk_set_threads(int threads);

/* What this machine can do at best, on as many threads as products use, to be timed by the caller.
 * bdk_read reads `bytes` of memory, aligned to 64, in one of bdk_read_ways() ways: the fastest is the machine's speed.
 * bdk_multiply_add does at least `operations` int8 multiplications and additions and returns how many. */
BDK_API int bdk_read_ways(void);
BDK_API uint64_t bdk_read(const void* memory, int64_t bytes, int way);
BDK_API int64_t bdk_multiply_add(int64_t operations);

#ifdef __cplusplus
}
#endif
#endif
