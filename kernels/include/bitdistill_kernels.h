/* The C ABI of the low-bit CPU kernels: y = x W^T (+ bias) with W packed in 2 or 3 bits.
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
#define BDK_ABI_VERSION 1

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
  BDK_LSQ3 = 6         /* (code - 4) * scale */
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

/* y [tokens, N] = x [tokens, K] W^T + bias [N] (or null).  activation_bits 0: fp32 activations; 8: x is quantised to
 * int8 with one scale per token, and all products of a group are summed exactly.  x and y must not overlap. */
BDK_API int bdk_matmul(const bdk_weight* weight, const float* x, int64_t tokens, const float* bias,
                       int32_t activation_bits, float* y);

/* The int8 activations that bdk_matmul uses: peak = max(max|x|, 1e-5), scale = peak / 127,
 * q = round half even (x * (127 / peak)).  A row that holds a NaN or an infinity gets the scale NaN and zeros. */
BDK_API int bdk_quantize_activation(const float* x, int64_t tokens, int64_t columns, int8_t* q, float* scale);

/* Instruction sets of this build, best first; names are static strings. */
BDK_API int bdk_instruction_set_count(void);
BDK_API const char* bdk_instruction_set_name(int index);
BDK_API int bdk_instruction_set_available(int index); /* 1 where this machine can run it */
BDK_API int bdk_instruction_set_chosen(void);
BDK_API int bdk_instruction_set_choose(int index);

/* Threads that share the rows of one product (the caller is one of them). */
BDK_API int bdk_threads(void);
BDK_API int bdk_set_threads(int threads);

#ifdef __cplusplus
}
#endif
#endif
