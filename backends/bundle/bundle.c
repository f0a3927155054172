/* The calls of graphwright.h, over those of the runtime: the processor and the weights are checked before any code runs. */
#include "bundle.h"

#include "internal.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#ifdef __APPLE__
#include <sys/sysctl.h>
#else
#include <sys/auxv.h>
#endif

struct graphwright_model {
    gw_context *context;
    void *mapped; /* the weights file; NULL where there is none */
    size_t mapped_bytes;
};

int graphwright_inputs(const graphwright_tensor **tensors) {
    if (tensors) *tensors = bundle.inputs;
    return bundle.input_count;
}

int graphwright_outputs(const graphwright_tensor **tensors) {
    if (tensors) *tensors = bundle.outputs;
    return bundle.output_count;
}

const char *graphwright_error(void) { return message; }

const char *graphwright_target(void) { return bundle.target; }

int graphwright_threads(const graphwright_model *model) {
    return !model ? 0 : model->context ? gw_get_threads(model->context) : 1;
}

int bundle_trace(graphwright_model *model, int64_t *nanoseconds) {
    return model->context ? gw_trace(model->context, nanoseconds) : 0;
}

static int processor_has(const bundle_feature *needed) {
#ifdef __APPLE__
    int answer = 0;
    size_t bytes = sizeof answer;
    return !sysctlbyname(needed->question, &answer, &bytes, NULL, 0) && answer;
#else
    return getauxval((unsigned long)needed->word) >> needed->bit & 1;
#endif
}

static int check_processor(void) {
    int missing = 0;
    for (int i = 0; i < bundle.feature_count; i++) {
        const bundle_feature *needed = &bundle.features[i];
        if (processor_has(needed)) continue;
        if (!missing++) {
            say("this processor lacks instructions that the model, compiled for ");
            say_more(bundle.target);
            say_more(", uses: ");
        } else {
            say_more(", ");
        }
        say_more(needed->name);
    }
    if (!missing) return GRAPHWRIGHT_OK;
    say_more("; compile it for this machine");
    return GRAPHWRIGHT_WRONG_MACHINE;
}

static uint64_t digest(const unsigned char *bytes, uint64_t count) {
    uint64_t value = 0xcbf29ce484222325u;
    for (uint64_t i = 0; i < count; i++) value = (value ^ bytes[i]) * 0x100000001b3u;
    return value;
}

static int refuse_weights(const char *path, const char *why) {
    say("the weights ");
    say_more(path);
    say_more(why);
    return GRAPHWRIGHT_WRONG_WEIGHTS;
}

/* Map the file; its data begins at a multiple of 64, and so does the mapping. */
static int map_weights(const char *path, graphwright_model *model) {
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return refuse_weights(path, " cannot be opened");
    char first;
    if (read(file, &first, 1) < 0) { /* a directory can be opened */
        close(file);
        return refuse_weights(path, " cannot be read");
    }
    off_t size = lseek(file, 0, SEEK_END);
    uint64_t expected = bundle.header_bytes + bundle.weights_bytes;
    if (size < 0 || (uint64_t)size != expected) {
        close(file);
        refuse_weights(path, " have ");
        say_number(size);
        say_more(" bytes and the model needs ");
        say_number((int64_t)expected);
        say_more(": copy the file of this bundle again");
        return GRAPHWRIGHT_WRONG_WEIGHTS;
    }
    void *mapped = mmap(NULL, (size_t)expected, PROT_READ, MAP_PRIVATE, file, 0);
    close(file);
    if (mapped == MAP_FAILED) return refuse_weights(path, " cannot be mapped");
    if (digest(mapped, bundle.header_bytes) != bundle.header_digest) {
        munmap(mapped, (size_t)expected);
        return refuse_weights(path, " belong to another model: take the file of this bundle");
    }
    model->mapped = mapped;
    model->mapped_bytes = (size_t)expected;
    return GRAPHWRIGHT_OK;
}

/* The weights inside are the last of what is mapped of this file. What it has no page for kills who reads it, but not who
 * lets the system read it, by writing it to a pipe: write(2), EFAULT. No name of the file is needed for that. */
static int check_embedded(void) {
    const char *end = (const char *)bundle.embedded + bundle.weights_bytes;
    size_t length = strlen(bundle.last);
    unsigned char found[64];
    int ends[2];
    if (pipe(ends)) {
        say("no pipe can be opened: too many files are open");
        return GRAPHWRIGHT_FAILED;
    }
    int whole = write(ends[1], end, length) == (ssize_t)length && read(ends[0], found, length) == (ssize_t)length &&
                digest(found, length) == digest((const void *)bundle.last, length);
    close(ends[0]);
    close(ends[1]);
    if (whole) return GRAPHWRIGHT_OK;
    say("this file is truncated: it ends within the weights inside it; copy it again");
    return GRAPHWRIGHT_WRONG_WEIGHTS;
}

int graphwright_init(const char *weights, int threads, graphwright_model **model) {
    if (!model) {
        say("graphwright_init: model is NULL");
        return GRAPHWRIGHT_FAILED;
    }
    *model = NULL;
    int wrong = check_processor();
    if (!wrong && bundle.weights_bytes && bundle.embedded) wrong = check_embedded();
    if (wrong) return wrong;
    graphwright_model *made = calloc(1, sizeof *made);
    if (!made) {
        say("out of memory for a model");
        return GRAPHWRIGHT_NO_MEMORY;
    }
    const void *data = bundle.embedded;
    if (bundle.weights_bytes && !data) {
        if (!weights) {
            say("this model's weights are in a file: give its path");
            wrong = GRAPHWRIGHT_WRONG_WEIGHTS;
        } else {
            wrong = map_weights(weights, made);
        }
        if (wrong) {
            free(made);
            return wrong;
        }
        data = (const char *)made->mapped + bundle.header_bytes;
    }
    if (bundle.runs) wrong = gw_init(data, bundle.weights_bytes, threads, &made->context);
    if (wrong) {
        graphwright_free(made);
        return wrong == GW_NO_MEMORY ? GRAPHWRIGHT_NO_MEMORY : GRAPHWRIGHT_WRONG_WEIGHTS;
    }
    *model = made;
    return GRAPHWRIGHT_OK;
}

void graphwright_free(graphwright_model *model) {
    if (!model) return;
    gw_free(model->context);
    if (model->mapped) munmap(model->mapped, model->mapped_bytes);
    free(model);
}

int graphwright_run(graphwright_model *model, const void *const *inputs, void *const *outputs) {
    if (!model) {
        say("graphwright_run: there is no model: graphwright_init failed, or was not called");
        return GRAPHWRIGHT_FAILED;
    }
    if ((!inputs && bundle.input_count) || (!outputs && bundle.output_count)) {
        say(!inputs && bundle.input_count ? "graphwright_run: inputs is NULL" : "graphwright_run: outputs is NULL");
        return GRAPHWRIGHT_FAILED;
    }
    for (int i = 0; i < bundle.input_count + bundle.output_count; i++) {
        int out = i - bundle.input_count;
        if (out < 0 ? inputs[i] != NULL : outputs[out] != NULL) continue;
        const graphwright_tensor *tensor = out < 0 ? &bundle.inputs[i] : &bundle.outputs[out];
        if (!tensor->bytes) continue;
        say("graphwright_run: the address of ");
        say_more(tensor->name);
        say_more(" is NULL");
        return GRAPHWRIGHT_FAILED;
    }
    if (bundle.runs) {
        void *read[bundle.read_count + 1], *written[bundle.written_count + 1];
        for (int i = 0; i < bundle.read_count; i++) read[i] = (void *)inputs[bundle.read[i]];
        for (int i = 0; i < bundle.written_count; i++) written[i] = outputs[bundle.written[i]];
        int failed = gw_run(model->context, 0, read, written);
        if (failed) return failed == GW_NO_MEMORY ? GRAPHWRIGHT_NO_MEMORY : GRAPHWRIGHT_FAILED;
    }
    for (int i = 0; i < bundle.copy_count; i++) {
        const bundle_copy *copy = &bundle.copies[i];
        const void *source = copy->kind == COPY_INPUT    ? inputs[copy->source]
                             : copy->kind == COPY_OUTPUT ? outputs[copy->source]
                                                         : copy->constant;
        memcpy(outputs[copy->output], source, bundle.outputs[copy->output].bytes);
    }
    return GRAPHWRIGHT_OK;
}
