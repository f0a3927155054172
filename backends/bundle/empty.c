/* In the place of generated code, for a model that computes nothing: its results are its inputs, or constants. */
#include <stdint.h>

int32_t gw_model_describe(uint64_t *facts) {
    for (int i = 0; i < 4; i++) facts[i] = 0;
    return 0;
}

int32_t gw_model_run(int32_t region, void *const *inputs, void *const *outputs, void *arena, const void *weights,
                     int32_t *status) {
    (void)region, (void)inputs, (void)outputs, (void)arena, (void)weights, (void)status;
    return -1;
}
