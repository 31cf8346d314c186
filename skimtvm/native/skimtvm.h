/* Run a module that `skimtvm compile` made, from C or C++, without Python.
 *
 * Every function returns SKIMTVM_OK or the kind of the error, whose text skimtvm_last_error() gives. Functions on
 * different instances may run at the same time in different threads; calls of one instance wait for each other. Instances
 * of the same file share its code and weights.
 *
 * A module is code: creating an instance runs it with the rights of the process. The checks made here find damaged,
 * truncated and foreign files; they are no protection against a file that was made to do harm. Load only modules from a
 * source that you trust.
 */
#ifndef SKIMTVM_H_
#define SKIMTVM_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define SKIMTVM_API __attribute__((visibility("default")))
#else
#define SKIMTVM_API
#endif

typedef enum skimtvm_status {
  SKIMTVM_OK = 0,
  SKIMTVM_BAD_ARGUMENT = 1,     /* a null pointer, an index out of range, a buffer of a wrong size */
  SKIMTVM_BAD_MODULE = 2,       /* no such file, not a module, truncated, damaged, of another version */
  SKIMTVM_INCOMPATIBLE_CPU = 3, /* the CPU lacks an instruction set that the module uses */
  SKIMTVM_FAILED = 4            /* out of memory, no more threads, an error inside the module */
} skimtvm_status;

typedef struct skimtvm_instance skimtvm_instance;

/* An input or output. `name`, `dtype` (NumPy's name, e.g. "float32") and `shape` belong to the instance. In a module of
 * several batch sizes shape[0] and `bytes` are those of the largest. */
typedef struct skimtvm_tensor_info {
  const char* name;
  const char* dtype;
  const int64_t* shape;
  int32_t rank;
  size_t bytes;
} skimtvm_tensor_info;

typedef struct skimtvm_input {
  const void* data; /* C-contiguous; used in place if it starts at a multiple of 64 bytes, otherwise copied */
  size_t bytes;
} skimtvm_input;

typedef struct skimtvm_output {
  void* data;
  size_t bytes;
} skimtvm_output;

/* Load the module file `path` and make an instance of it with so many `threads` (0: one for each CPU that the calling
 * thread may use). The instance has threads of its own, whoever calls it. */
SKIMTVM_API int skimtvm_create(const char* path, int threads, skimtvm_instance** instance);

/* Free the instance; null is allowed. Its threads have ended when this returns. No call of it may be under way. */
SKIMTVM_API void skimtvm_destroy(skimtvm_instance* instance);

SKIMTVM_API int32_t skimtvm_input_count(const skimtvm_instance* instance);
SKIMTVM_API int32_t skimtvm_output_count(const skimtvm_instance* instance);
SKIMTVM_API int skimtvm_input_info(const skimtvm_instance* instance, int32_t index, skimtvm_tensor_info* info);
SKIMTVM_API int skimtvm_output_info(const skimtvm_instance* instance, int32_t index, skimtvm_tensor_info* info);

/* The batch sizes that a module of several holds, ascending. `*count` is 0 if it takes exactly the shapes of its inputs;
 * otherwise it runs any number of images. `*sizes` belongs to the instance. */
SKIMTVM_API int skimtvm_batches(const skimtvm_instance* instance, const int64_t** sizes, int32_t* count);

/* Run `images` images: any number from 1 for a module of several batch sizes, otherwise 0 (the shapes of the inputs) or
 * the first dimension that all of them have. There are as many `inputs` and `outputs` as the counts say, each of exactly
 * `info.bytes`, times `images` over `info.shape[0]` where there are several batch sizes. Outputs may be written in part
 * when an error is returned, and must not overlap with inputs. */
SKIMTVM_API int skimtvm_run(skimtvm_instance* instance, int64_t images, const skimtvm_input* inputs,
                            const skimtvm_output* outputs);

/* What went wrong in the last call of this thread that failed, in one line; empty if none did. Valid until the next
 * failing call of this thread. */
SKIMTVM_API const char* skimtvm_last_error(void);

#ifdef __cplusplus
}
#endif

#endif /* SKIMTVM_H_ */
