/* The C interface of libgircse: GIRCSE bundles, embedded without Python.
 *
 * Rules that every function keeps:
 *   - It returns NULL for success, or an error that the caller frees with gircse_error_free. It never aborts, prints,
 *     or lets a C++ exception out.
 *   - Texts are UTF-8, given as pointer and size in bytes; a NUL byte inside is text like any other.
 *   - The caller owns all memory that it passes in, and nothing of it is kept after the call.
 *   - Every function may be called from any thread. Several threads may share one embedder.
 *   - Structs that begin with `size` grow at their end only. Their _init function fills `size` and the defaults; a
 *     program that was compiled with an older header keeps working with a newer library, and the other way round unless
 *     it sets a field that the library does not know, which is an error.
 *   - Symbols, enumerators and fields are never removed or renumbered while GIRCSE_ABI_VERSION stays.
 */
#ifndef GIRCSE_GIRCSE_H
#define GIRCSE_GIRCSE_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__) || defined(__clang__)
#define GIRCSE_API __attribute__((visibility("default")))
#else
#define GIRCSE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define GIRCSE_ABI_VERSION 1

/* A bundle that is open. The pointer stays valid after gircse_close, so that a late call is refused. */
typedef struct gircse_embedder gircse_embedder;

/* What went wrong; NULL is success. */
typedef struct gircse_error gircse_error;

typedef enum gircse_code {
  GIRCSE_OK = 0,
  GIRCSE_ERROR_OPTION = 1,   /* an argument has a value that it cannot have; UTF-8 errors too */
  GIRCSE_ERROR_BUNDLE = 2,   /* the bundle is missing, damaged, unsafe, or not what its manifest says */
  GIRCSE_ERROR_PROVIDER = 3, /* ONNX Runtime is missing, too old, cannot use the provider, or failed in a run */
  GIRCSE_ERROR_CLOSED = 4,   /* the embedder is closed, or NULL */
  GIRCSE_ERROR_CAPACITY = 5, /* an output buffer is too small */
  GIRCSE_ERROR_MEMORY = 6,   /* memory ran out */
  GIRCSE_ERROR_INTERNAL = 7, /* a fault of the library */
} gircse_code;

typedef struct gircse_text {
  const char *data; /* UTF-8; may be NULL where size is 0 */
  size_t size;      /* bytes */
} gircse_text;

typedef struct gircse_open_options {
  size_t size;             /* of this struct, in bytes */
  const char *precision;   /* variant; NULL: FP32 on the CPU and FP16 on a GPU, where the bundle has them */
  const char *provider;    /* "auto", "cpu", "cuda" or "onnxruntime-tensorrt"; NULL is "auto" */
  const char *layout;      /* "stepwise" or "unrolled"; NULL: stepwise on the CPU, unrolled on a GPU */
  const char *onnxruntime; /* path of ONNX Runtime's library; NULL: $GIRCSE_ONNXRUNTIME, else the loader's search */
  int32_t threads;         /* of one run on the CPU; 0: every physical core, or one with several streams */
  int32_t verify;          /* not 0: compare the hashes of all files, and the tokens of the golden texts (default) */
  int32_t prefix_cache;    /* not 0: run what the texts of a call begin with once, and keep it, in the stepwise layout
                            * on the CPU (default) */
  size_t streams;          /* batches of a call that run at once on the CPU (default 1). With as many as there are cores
                            * most texts a second are embedded, and a single text takes longer */
} gircse_open_options;

typedef struct gircse_encode_options {
  size_t size;             /* of this struct, in bytes */
  gircse_text instruction; /* put before every text by the bundle's template; leave it out for documents */
  gircse_text prompt;      /* put before every text as it is; instead of an instruction; unset where data is NULL */
  int32_t steps;           /* refinement steps, 0 to K; -1 is K (default) */
  int32_t all_steps;       /* not 0: give z_1..z_steps of every text */
  size_t batch_size;       /* maximum texts per batch (default 32) */
  size_t batch_tokens;     /* maximum tokens per batch, padding included (default 4096) */
  int32_t refuse_overflow; /* not 0: a prompt that is too long is an error; 0: it is cut (default) */
  size_t first_text;       /* number of the first text, for errors of a text (default 0) */
} gircse_encode_options;

/* Facts of an open embedder. The strings live until it is closed. */
typedef struct gircse_description {
  size_t size;                   /* of this struct, in bytes */
  size_t dimension;              /* length of a vector */
  size_t steps;                  /* K, the most refinement steps */
  size_t max_tokens;             /* longest prompt in tokens, the instruction included */
  const char *precision;         /* the variant that runs */
  const char *provider;          /* where it runs, never "auto" */
  const char *layout;            /* the graph that runs */
  const char *query_instruction; /* the bundle's instruction for queries; empty where it has none */
  const char *onnxruntime;       /* version of ONNX Runtime */
  const char *skipped;           /* why "auto" passed over better providers, one per line; empty otherwise */
  const char *warning;           /* names what a GPU leaves to the CPU, which is slow, in one line; empty otherwise */
} gircse_description;

/* How far the golden texts are from the PyTorch reference, over every text and step. */
typedef struct gircse_self_test_report {
  size_t size;           /* of this struct, in bytes */
  size_t texts;          /* golden texts */
  int32_t passed;        /* not 0: every vector is within the limit */
  double min_cosine;     /* smallest cosine; NaN fails */
  double limit;          /* smallest cosine that passes at this precision */
  double max_difference; /* largest difference of an element */
  size_t worst_step;     /* the first step that fails, or the one with the smallest cosine; 0 is the prompt */
  size_t worst_text;     /* number of the text with the smallest cosine in that step, from 0 */
} gircse_self_test_report;

/* GIRCSE_ABI_VERSION of the library that is loaded. */
GIRCSE_API uint32_t gircse_abi_version(void);

/* Version of the library, such as "0.1.0". */
GIRCSE_API const char *gircse_version(void);

/* Fill a struct of `size` bytes with the defaults: gircse_open_options_init(&options, sizeof options). */
GIRCSE_API void gircse_open_options_init(gircse_open_options *options, size_t size);
GIRCSE_API void gircse_encode_options_init(gircse_encode_options *options, size_t size);

/* Open a bundle: check its manifest and files, load the tokenizer and a graph. `options` may be NULL. */
GIRCSE_API gircse_error *gircse_open(const char *bundle, const gircse_open_options *options,
                                     gircse_embedder **embedder);

/* Close an embedder. Calls that run in other threads finish as if nothing had happened, and the last one frees the
 * graph; later calls return GIRCSE_ERROR_CLOSED. NULL, and closing twice, do nothing. */
GIRCSE_API void gircse_close(gircse_embedder *embedder);

/* Fill a description, whose `size` the caller has set. */
GIRCSE_API gircse_error *gircse_describe(const gircse_embedder *embedder, gircse_description *description);

/* Embed `count` texts into `vectors`: (count, dimension) unit vectors, or (count, steps, dimension) with all_steps.
 *
 * `capacity` is the size of `vectors` in floats. Row i belongs to text i. Nothing can be assumed of `vectors` after an
 * error. `truncated`, where it is not NULL, receives how many texts were cut. `options` may be NULL. */
GIRCSE_API gircse_error *gircse_encode(const gircse_embedder *embedder, const gircse_text *texts, size_t count,
                                       const gircse_encode_options *options, float *vectors, size_t capacity,
                                       size_t *truncated);

/* Embed prompts that are token ids already: `ids` holds them one after the other, `lengths[i]` of prompt i.
 * A prompt has 1 to max_tokens tokens. `instruction`, `prompt` and `refuse_overflow` have to be unset. */
GIRCSE_API gircse_error *gircse_encode_tokens(const gircse_embedder *embedder, const int64_t *ids,
                                              const size_t *lengths, size_t count, const gircse_encode_options *options,
                                              float *vectors, size_t capacity);

/* Give the token ids that the graph would see of `count` texts, one after the other, in the form that
 * gircse_encode_tokens takes. A capacity of count * max_tokens is always enough. */
GIRCSE_API gircse_error *gircse_tokenize(const gircse_embedder *embedder, const gircse_text *texts, size_t count,
                                         const gircse_encode_options *options, int64_t *ids, size_t capacity,
                                         size_t *lengths, size_t *truncated);

/* Embed the bundle's golden texts and compare every step with PyTorch. A failed test is no error: see `passed`. */
GIRCSE_API gircse_error *gircse_self_test(const gircse_embedder *embedder, gircse_self_test_report *report);

/* Of NULL: GIRCSE_OK, and an empty text. The message is one line of UTF-8 that lives as long as its error. */
GIRCSE_API gircse_code gircse_error_code(const gircse_error *error);
GIRCSE_API const char *gircse_error_message(const gircse_error *error);
GIRCSE_API void gircse_error_free(gircse_error *error);

#ifdef __cplusplus
}
#endif

#endif /* GIRCSE_GIRCSE_H */
