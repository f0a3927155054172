/* The program `run` of a bundle: one model, inputs from files, results to files, and the time of a call. */
#include "bundle.h"
#include "files.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#ifdef __APPLE__
#include <mach-o/dyld.h>
#else
#include <sys/auxv.h>
#endif

#define MOST_THREADS 256 /* that the runtime can hold */

static const char USAGE[] =
    "usage: run [--input [NAME=]FILE]... [--output [NAME=]FILE]... [--repeat N] [--threads N] [--pause N]\n"
    "           [--weights FILE] [--profile]\n"
    "\n"
    "  --input    a .npy file, or the bare bytes of a tensor; in the model's order, or by name. Without any: noise\n"
    "  --output   where a result goes: .npy, or the bare bytes under any other name\n"
    "  --repeat   calls to time, after one that warms up (default: one call in all)\n"
    "  --threads  threads of a call, 256 at most (default: all cores)\n"
    "  --pause    milliseconds between timed calls, in which the other threads go to sleep (default: none)\n"
    "  --profile  print the microseconds of each kernel, the median of the timed calls\n"
    "  --weights  the weights file (default: weights.safetensors beside this program)\n"
    "  --describe print what goes in and what comes out, and stop\n";

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* The tensor that "NAME=FILE" or the next unnamed FILE belongs to; `*path` becomes the file. */
static int place(const char **path, const graphwright_tensor *tensors, int count, const char *option, int *next) {
    const char *equals = strchr(*path, '=');
    int named = -1;
    for (int i = 0; equals && i < count; i++) { /* a name may have a '=' in it: the longest counts */
        size_t length = strlen(tensors[i].name);
        if (strncmp(tensors[i].name, *path, length) || (*path)[length] != '=') continue;
        if (named < 0 || length > strlen(tensors[named].name)) named = i;
    }
    if (named >= 0) {
        *path += strlen(tensors[named].name) + 1;
        return named;
    }
    FILE *there = equals ? fopen(*path, "rb") : NULL; /* the name of a file may have a '=' in it */
    if (there) fclose(there);
    if (equals && !there && !memchr(*path, '/', (size_t)(equals - *path))) {
        char names[1024] = "";
        for (int i = 0; i < count; i++) {
            size_t used = strlen(names);
            snprintf(names + used, sizeof names - used, "%s%s", i ? ", " : "", tensors[i].name);
        }
        die("--%s %s: there is no %s %.*s; the model has %s", option, *path, option, (int)(equals - *path), *path,
            count ? names : "none");
    }
    if (*next >= count) die("--%s %s: the model has %d %s%s", option, *path, count, option, count == 1 ? "" : "s");
    return (*next)++;
}

static int number(const char *option, const char *text, int most) {
    char *end;
    long value = strtol(text, &end, 10);
    if (*end || end == text || value < 1) die("%s %s: a whole number of at least 1", option, text);
    if (value > most) die("%s %s: at most %d", option, text, most);
    return (int)value;
}

/* The file of one more tensor: an input or output that has one already is an error. */
static void give(const char **files, const char *option, const char *value, const graphwright_tensor *tensors, int count,
                 int *next) {
    const char *path = value;
    int to = place(&path, tensors, count, option, next);
    if (files[to]) die("--%s %s: %s has %s already", option, value, tensors[to].name, files[to]);
    files[to] = path;
}

/* `value` in the leading bits of a half: multiples of 1/1024 between -1 and 1 are exact in it. */
static uint16_t half_of(float value) {
    uint32_t steps = (uint32_t)(value < 0 ? -value * 1024 : value * 1024), exponent = 15;
    uint16_t sign = value < 0 ? 0x8000 : 0;
    if (!steps) return sign;
    for (; steps < 1024; steps <<= 1) exponent--;
    return (uint16_t)(sign | exponent << 10 | (steps & 1023));
}

/* Values between -1 and 1 where they are floating point, zeros and ones else: those index any table of two rows. */
static void *noise(const graphwright_tensor *tensor, int which) {
    unsigned char *data = calloc(1, tensor->bytes ? (size_t)tensor->bytes : 1);
    if (!data) die("out of memory for %s", tensor->name);
    uint64_t state = 0x9E3779B97F4A7C15u * (uint64_t)(which + 1), count = 1;
    for (int i = 0; i < tensor->rank; i++) count *= (uint64_t)tensor->shape[i];
    size_t item = count ? (size_t)(tensor->bytes / count) : 1;
    for (uint64_t i = 0; i < count; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        float value = (float)(int32_t)(state >> 32) / 2147483648.0f;
        double wide = value;
        uint16_t half = half_of(value);
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        uint16_t leading = (uint16_t)(bits >> 16);
        unsigned char *at = data + i * item;
        if (!strcmp(tensor->dtype, "float32")) memcpy(at, &value, sizeof value);
        else if (!strcmp(tensor->dtype, "float64")) memcpy(at, &wide, sizeof wide);
        else if (!strcmp(tensor->dtype, "float16")) memcpy(at, &half, sizeof half);
        else if (!strcmp(tensor->dtype, "bfloat16")) memcpy(at, &leading, sizeof leading);
        else if (!strcmp(tensor->dtype, "bool")) *at = state >> 63;
        else if (!strncmp(tensor->dtype, "int", 3) || !strncmp(tensor->dtype, "uint", 4)) *at = state >> 63;
    }
    return data;
}

static char *beside_program(const char *name) {
    static char path[PATH_MAX];
#ifdef __APPLE__
    uint32_t room = sizeof path;
    if (_NSGetExecutablePath(path, &room)) return strcpy(path, name);
#else
    ssize_t length = readlink("/proc/self/exe", path, sizeof path - 1);
    if (length < 0) return strcpy(path, name);
    path[length] = 0;
#endif
    char *slash = strrchr(path, '/');
    size_t kept = slash ? (size_t)(slash - path) + 1 : 0;
    if (kept + strlen(name) >= sizeof path) die("the path of this program is too long");
    strcpy(path + kept, name);
    return path;
}

#ifdef __arm__
/* The runtime's own start, which comes after this, and its end are for ARMv7. */
__attribute__((constructor(101))) static void check_architecture(void) {
    const char *platform = (const char *)getauxval(AT_PLATFORM); /* "v6l", "v7l", "v8l" */
    if (!platform || platform[0] != 'v' || platform[1] < '4' || platform[1] > '6') return;
    static const char why[] = "run: this processor is older than ARMv7, which the model needs\n";
    ssize_t written = write(2, why, sizeof why - 1);
    _exit(written >= 0 ? 1 : 2);
}
#endif

static int ascending(const void *left, const void *right) {
    double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

/* The median of every step: stamps are `marks` nanoseconds of each call. */
static void print_steps(const int64_t *stamps, int marks, int calls) {
    double *times = calloc((size_t)calls, sizeof *times);
    if (!times) die("out of memory");
    for (int step = 0; step + 1 < marks; step++) {
        for (int i = 0; i < calls; i++) {
            const int64_t *at = stamps + (size_t)i * (size_t)marks + step;
            times[i] = 1e-3 * (double)(at[1] - at[0]);
        }
        qsort(times, (size_t)calls, sizeof *times, ascending);
        printf("step %d: %.3f us\n", step, times[calls / 2]);
    }
    free(times);
}

int main(int argc, char **argv) {
    const graphwright_tensor *inputs, *outputs;
    int input_count = graphwright_inputs(&inputs), output_count = graphwright_outputs(&outputs);
    const char **files = calloc((size_t)(input_count + output_count) + 1, sizeof *files);
    const char **results = files + input_count, *weights = NULL;
    int repeat = 0, threads = 0, pause = 0, profile = 0, next_input = 0, next_output = 0;
    if (!files) die("out of memory");
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--help")) {
            fputs(USAGE, stdout);
            return 0;
        }
        if (!strcmp(argv[i], "--describe")) {
            printf("compiled for %s\n", graphwright_target());
            for (int k = 0; k < input_count; k++) printf("input %s: %s\n", inputs[k].name, describe(&inputs[k]));
            for (int k = 0; k < output_count; k++) printf("output %s: %s\n", outputs[k].name, describe(&outputs[k]));
            return 0;
        }
        if (!strcmp(argv[i], "--profile")) {
            profile = 1;
            continue;
        }
        const char *option = argv[i], *value = i + 1 < argc ? argv[++i] : NULL;
        int known = !strcmp(option, "--input") || !strcmp(option, "--output") || !strcmp(option, "--repeat") ||
                    !strcmp(option, "--threads") || !strcmp(option, "--pause") || !strcmp(option, "--weights");
        if (!known || !value) {
            fputs(USAGE, stderr);
            die(known ? "%s needs a value" : "there is no option %s", option);
        }
        if (!strcmp(option, "--input")) {
            give(files, "input", value, inputs, input_count, &next_input);
        } else if (!strcmp(option, "--output")) {
            give(results, "output", value, outputs, output_count, &next_output);
        } else if (!strcmp(option, "--repeat")) {
            repeat = number(option, value, INT_MAX);
        } else if (!strcmp(option, "--threads")) {
            threads = number(option, value, MOST_THREADS);
        } else if (!strcmp(option, "--pause")) {
            pause = number(option, value, INT_MAX);
        } else {
            weights = value;
        }
    }
    if (weights && (bundle.embedded || !bundle.weights_bytes))
        die("--weights %s: %s; leave it out", weights,
            bundle.embedded ? "the weights are inside this program" : "this model has no weights");
    for (int i = 0; i < output_count; i++)
        if (results[i]) check_writable(results[i], &outputs[i]);
    if (profile && !repeat) repeat = 1;
    int given = 0;
    for (int i = 0; i < input_count; i++) given += files[i] != NULL;
    double started = seconds();
    graphwright_model *model;
    if (graphwright_init(weights ? weights : beside_program("weights.safetensors"), threads, &model))
        die("%s", graphwright_error());
    int used = graphwright_threads(model);
    printf("loaded in %.3f ms, %d thread%s\n", 1e3 * (seconds() - started), used, used == 1 ? "" : "s");
    if (!given && input_count) puts("inputs: noise (give --input FILE for your own)");
    const void **sources = calloc((size_t)input_count + 1, sizeof *sources);
    void **targets = calloc((size_t)output_count + 1, sizeof *targets);
    double *times = calloc((size_t)repeat + 1, sizeof *times);
    int marks = profile ? bundle_trace(model, NULL) : 0;
    if (marks && (size_t)repeat >= SIZE_MAX / sizeof(int64_t) / (size_t)marks) die("--repeat %d: too many for --profile", repeat);
    int64_t *stamps = calloc((size_t)repeat * (size_t)marks + 1, sizeof *stamps);
    if (!sources || !targets || !times || !stamps) die("out of memory");
    for (int i = 0; i < input_count; i++) {
        if (given && !files[i]) die("--input for %s is missing: %s", inputs[i].name, describe(&inputs[i]));
        sources[i] = given ? read_tensor(files[i], &inputs[i]) : noise(&inputs[i], i);
    }
    for (int i = 0; i < output_count; i++)
        if (!(targets[i] = calloc(1, outputs[i].bytes ? (size_t)outputs[i].bytes : 1))) die("out of memory");
    started = seconds();
    if (graphwright_run(model, sources, targets)) die("%s", graphwright_error());
    double first = seconds() - started, total = 0;
    for (int i = 0; i < repeat; i++) {
        for (double until = seconds() + 1e-3 * pause; pause && seconds() < until;) continue;
        if (marks) bundle_trace(model, stamps + (size_t)i * (size_t)marks);
        started = seconds();
        if (graphwright_run(model, sources, targets)) die("%s", graphwright_error());
        total += times[i] = seconds() - started;
    }
    qsort(times, (size_t)repeat, sizeof *times, ascending);
    for (int i = 0; i < output_count; i++) {
        printf("output %s: %s\n", outputs[i].name, describe(&outputs[i]));
        if (results[i]) write_tensor(results[i], &outputs[i], targets[i]);
    }
    if (marks) print_steps(stamps, marks, repeat);
    printf("latency: first call %.3f ms", 1e3 * first);
    if (repeat)
        printf(", then min %.3f, median %.3f, mean %.3f ms of %d", 1e3 * times[0], 1e3 * times[repeat / 2],
               1e3 * total / repeat, repeat);
    putchar('\n');
    for (int i = 0; i < input_count; i++) free((void *)sources[i]);
    for (int i = 0; i < output_count; i++) free(targets[i]);
    free(sources), free(targets), free(times), free(stamps), free(files);
    graphwright_free(model);
    return 0;
}
