/* numpy's .npy format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
 *
 *     "\x93NUMPY" major minor, the header's length (2 bytes, 4 from version 2 on), a Python dictionary, the elements
 */
#include "files.h"

#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAGIC "\x93NUMPY"
#define MOST_HEADER (1u << 20)

static const char *const DTYPES[][2] = {
    {"float64", "<f8"}, {"float32", "<f4"},    {"float16", "<f2"},  {"bfloat16", "|V2"}, {"int64", "<i8"},
    {"int32", "<i4"},   {"int16", "<i2"},      {"int8", "|i1"},     {"uint64", "<u8"},   {"uint32", "<u4"},
    {"uint16", "<u2"},  {"uint8", "|u1"},      {"bool", "|b1"},     {"complex64", "<c8"},
};

void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fflush(stdout);
    fputs("run: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(1);
}

static const char *code_of(const char *dtype) {
    for (size_t i = 0; i < sizeof DTYPES / sizeof *DTYPES; i++)
        if (!strcmp(DTYPES[i][0], dtype)) return DTYPES[i][1];
    die("the model has a tensor of %s, which .npy files do not hold: use a file of bare bytes", dtype);
}

static int is_npy(const char *path) {
    size_t length = strlen(path);
    return length >= 4 && !strcmp(path + length - 4, ".npy");
}

static void write_shape(char *text, size_t size, const graphwright_tensor *tensor, const char *after_one) {
    size_t used = 0;
    text[0] = 0;
    for (int i = 0; i < tensor->rank && used < size; i++)
        used += (size_t)snprintf(text + used, size - used, "%s%lld", i ? ", " : "", (long long)tensor->shape[i]);
    if (tensor->rank == 1 && used < size) snprintf(text + used, size - used, "%s", after_one);
}

const char *describe(const graphwright_tensor *tensor) {
    static char texts[4][256];
    static int turn;
    char shape[192], *text = texts[turn++ % 4];
    write_shape(shape, sizeof shape, tensor, "");
    snprintf(text, sizeof *texts, "%s[%s]", tensor->dtype, shape);
    return text;
}

/* What follows `key` in the header's dictionary. */
static const char *value_of(const char *header, const char *key, const char *path) {
    const char *found = strstr(header, key);
    if (!found || !(found = strchr(found + strlen(key), ':'))) die("%s: its .npy header has no %s", path, key);
    do found++;
    while (*found == ' ');
    return found;
}

static void check_header(const char *header, const char *path, const graphwright_tensor *tensor) {
    const char *code = code_of(tensor->dtype), *found = value_of(header, "'descr'", path);
    const char *end = found + 1 + strcspn(found + 1, "'");
    size_t length = (size_t)(end - found - 1);
    if (*found != '\'' || length != strlen(code) || memcmp(found + 1, code, length))
        die("%s: %s is %s ('%s' in numpy) and the file has %.*s: convert it", path, tensor->name, describe(tensor), code,
            (int)(end - found) + 1, found);
    if (strncmp(value_of(header, "'fortran_order'", path), "False", 5) && tensor->rank > 1)
        die("%s: is in Fortran order: save numpy.ascontiguousarray of it", path);
    const char *shape = value_of(header, "'shape'", path), *rest = shape + 1;
    int same = *shape == '(';
    for (int i = 0; same && i < tensor->rank; i++) {
        char *after;
        same = strtoll(rest, &after, 10) == tensor->shape[i] && after != rest;
        rest = after + strspn(after, ", ");
    }
    if (!same || *rest != ')')
        die("%s: %s is %s and the file has shape %.*s", path, tensor->name, describe(tensor),
            (int)strcspn(shape, ")") + 1, shape);
}

static void read_all(FILE *file, const char *path, void *to, size_t bytes, const char *what) {
    if (fread(to, 1, bytes, file) != bytes) die("%s: ends within its %s", path, what);
}

void *read_tensor(const char *path, const graphwright_tensor *tensor) {
    struct stat about;
    if (stat(path, &about)) die("%s: cannot be opened: %s", path, strerror(errno));
    if (!S_ISREG(about.st_mode))
        die("%s: is a %s, not a file of %s", path, S_ISDIR(about.st_mode) ? "directory" : "pipe or device", tensor->name);
    FILE *file = fopen(path, "rb");
    if (!file) die("%s: cannot be opened: %s", path, strerror(errno));
    unsigned char start[12] = {0};
    size_t got = fread(start, 1, 8, file);
    if (got == 8 && !memcmp(start, MAGIC, 6)) {
        unsigned wide = start[6] >= 2 ? 4 : 2, length = 0;
        read_all(file, path, start + 8, wide, "header");
        for (unsigned i = 0; i < wide; i++) length |= (unsigned)start[8 + i] << 8 * i;
        char *header = length <= MOST_HEADER ? calloc(1, length + 1) : NULL;
        if (!header) die("%s: a .npy header of %u bytes cannot be right", path, length);
        read_all(file, path, header, length, "header");
        check_header(header, path, tensor);
        free(header);
    } else if (fseek(file, 0, SEEK_SET)) {
        die("%s: is no file that can be read from its start", path);
    }
    long first = ftell(file);
    if (first < 0 || fseek(file, 0, SEEK_END)) die("%s: is no file whose size is known", path);
    unsigned long long bytes = (unsigned long long)(ftell(file) - first);
    if (bytes != tensor->bytes)
        die("%s: %s is %s, %llu bytes, and the file holds %llu", path, tensor->name, describe(tensor),
            (unsigned long long)tensor->bytes, bytes);
    void *data = malloc(bytes ? (size_t)bytes : 1);
    if (!data) die("out of memory for %s: %llu bytes", tensor->name, bytes);
    fseek(file, first, SEEK_SET);
    read_all(file, path, data, (size_t)bytes, "elements");
    fclose(file);
    return data;
}

void check_writable(const char *path, const graphwright_tensor *tensor) {
    struct stat about;
    int there = !stat(path, &about);
    if (there && S_ISDIR(about.st_mode)) die("%s: is a directory: name a file for %s", path, tensor->name);
    if (there && access(path, W_OK)) die("%s: cannot be written: %s", path, strerror(errno));
    if (is_npy(path)) code_of(tensor->dtype);
    if (there) return;
    char folder[PATH_MAX];
    const char *slash = strrchr(path, '/');
    size_t length = slash ? (size_t)(slash - path) + 1 : 1;
    if (length >= sizeof folder) die("%s: the name is too long", path);
    memcpy(folder, slash ? path : ".", length);
    folder[length] = 0;
    if (access(folder, W_OK | X_OK)) die("%s: cannot be written into %s: %s", path, folder, strerror(errno));
}

void write_tensor(const char *path, const graphwright_tensor *tensor, const void *data) {
    FILE *file = fopen(path, "wb");
    if (!file) die("%s: cannot be written: %s", path, strerror(errno));
    if (is_npy(path)) {
        char shape[1024], header[2048];
        write_shape(shape, sizeof shape, tensor, ",");
        int used = snprintf(header, sizeof header, "{'descr': '%s', 'fortran_order': False, 'shape': (%s), }",
                            code_of(tensor->dtype), shape);
        while ((10 + used + 1) % 64) header[used++] = ' '; /* the elements begin on a multiple of 64 */
        header[used++] = '\n';
        unsigned char start[] = {0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, (unsigned char)used, (unsigned char)(used >> 8)};
        fwrite(start, 1, sizeof start, file);
        fwrite(header, 1, (size_t)used, file);
    }
    fwrite(data, 1, (size_t)tensor->bytes, file);
    int failed = ferror(file);
    if (fclose(file) || failed) die("%s: could not be written whole: is the disk full?", path);
}
