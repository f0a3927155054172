/* The model of this bundle from C, on inputs of zeros; prints the first values of every result.
 *
 *     cc example.c ./model.so -o example && ./example weights.safetensors
 */
#include "graphwright.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int fail(void) {
    fprintf(stderr, "example: %s\n", graphwright_error());
    return 1;
}

int main(int argc, char **argv) {
    const graphwright_tensor *inputs, *outputs;
    int input_count = graphwright_inputs(&inputs), output_count = graphwright_outputs(&outputs);

    graphwright_model *model;
    if (graphwright_init(argc > 1 ? argv[1] : NULL, 0, &model)) return fail();

    const void **given = calloc(input_count + 1, sizeof *given);
    void **results = calloc(output_count + 1, sizeof *results);
    for (int i = 0; i < input_count; i++) given[i] = calloc(1, inputs[i].bytes + 1);
    for (int i = 0; i < output_count; i++) results[i] = calloc(1, outputs[i].bytes + 1);

    if (graphwright_run(model, given, results)) return fail();

    for (int i = 0; i < output_count; i++) {
        printf("%s: %s, %llu bytes", outputs[i].name, outputs[i].dtype, (unsigned long long)outputs[i].bytes);
        if (!strcmp(outputs[i].dtype, "float32"))
            for (uint64_t k = 0; k < 4 && k < outputs[i].bytes / sizeof(float); k++)
                printf(" %g", ((const float *)results[i])[k]);
        putchar('\n');
    }
    for (int i = 0; i < input_count; i++) free((void *)given[i]);
    for (int i = 0; i < output_count; i++) free(results[i]);
    free(given), free(results);
    graphwright_free(model);
    return 0;
}
