// What kernels call of llvm.amdgcn.*, on pointers to the result and to the operands, for one thread of a block that
// threads.h runs. Device functions (ocml) are those of C.
#pragma once
#include "device.h"

#define AMDGCN(name) extern "C" void emulated_amdgcn_##name

#define NUMBER(name, value) \
  AMDGCN(name)(int *result) { *result = static_cast<int>(value); }
NUMBER(workitem_id_x, emulated::current->index.x)
NUMBER(workitem_id_y, emulated::current->index.y)
NUMBER(workitem_id_z, emulated::current->index.z)
NUMBER(workgroup_id_x, emulated::block_index.x)
NUMBER(workgroup_id_y, emulated::block_index.y)
NUMBER(workgroup_id_z, emulated::block_index.z)
NUMBER(groupstaticsize, emulated::shared_bytes())
#undef NUMBER

AMDGCN(s_barrier)() {
  emulated::check_barrier();
  emulated::wait(emulated::State::at_block_barrier);
}
AMDGCN(wave_barrier)() { emulated::wait(emulated::State::at_warp_barrier); }
// The lanes in front of this one whose bit is set in a mask, of lanes 0 to 31 and of the others.
AMDGCN(mbcnt_lo)(int *result, const int *mask, const int *more) {
  int lane = emulated::current->lane;
  *result = *more + __builtin_popcount(lane >= 32 ? *mask : *mask & ((1u << lane) - 1));
}
AMDGCN(mbcnt_hi)(int *result, const int *mask, const int *more) {
  int lane = emulated::current->lane - 32;
  *result = *more + (lane <= 0 ? 0 : __builtin_popcount(*mask & ((1u << lane) - 1)));
}
// From a lane by the number of its bytes; 0 where that lane does not take part.
AMDGCN(ds_bpermute)(int *result, const int *bytes, const int *value) {
  int lane = *bytes / 4 & (EMULATED_WARP - 1), found = emulated::exchange(*value, lane);
  *result = emulated::current->together >> lane & 1 ? found : 0;
}

#define MATRIX(name, function, sums)                                                        \
  AMDGCN(name)(float *result, const void *a, const void *b, const float *d, ...) {          \
    std::memcpy(result, d, sums * sizeof(float));                                           \
    function(a, b, result);                                                                 \
  }
#if EMULATED_WARP == 64
MATRIX(mfma_f32_16x16x16f16, amd_float16_1, 4)
MATRIX(mfma_f32_16x16x16bf16_1k, amd_bfloat16_1, 4)
#else
MATRIX(wmma_f32_16x16x16_f16_v8f32_v8f16, amd_float16_1, 8)
MATRIX(wmma_f32_16x16x16_bf16_v8f32_v8i16, amd_bfloat16_1, 8)
MATRIX(wmma_f32_16x16x16_f16_v8f32_v16f16, amd_float16_2, 8)
MATRIX(wmma_f32_16x16x16_bf16_v8f32_v16i16, amd_bfloat16_2, 8)
#endif
#undef MATRIX
