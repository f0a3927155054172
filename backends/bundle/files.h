/* Tensors in files: numpy's .npy format, or the bare bytes. */
#ifndef GRAPHWRIGHT_FILES_H
#define GRAPHWRIGHT_FILES_H

#include "graphwright.h"

/* Print "run: " and the message to stderr, and exit with status 1. */
_Noreturn void die(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* The elements in the file, checked against the tensor's dtype, shape and size; to be given to free(). */
void *read_tensor(const char *path, const graphwright_tensor *tensor);

/* Dies where a result cannot be written to `path`, as far as can be told without touching it. */
void check_writable(const char *path, const graphwright_tensor *tensor);

/* .npy where the name ends so, else the bare bytes. */
void write_tensor(const char *path, const graphwright_tensor *tensor, const void *data);

/* "float32[1, 3, 224, 224]", in memory that the next call but three uses again. */
const char *describe(const graphwright_tensor *tensor);

#endif
