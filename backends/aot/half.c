/* Conversions that LLVM asks its own run-time library for, where the processor has no instruction for them.
 *
 * On 32-bit Arm they take and give floating point in integer registers, whatever the program's convention is (LLVM,
 * ARMISelLowering.cpp: "always soft-float").
 */
#include <stdint.h>
#include <string.h>

#ifdef __arm__
#define CONVERSION __attribute__((pcs("aapcs")))
typedef uint16_t half;
#else
#define CONVERSION
typedef _Float16 half;
#endif

/* double to half in one rounding, to nearest and ties to even; through float it would be two. */
static uint16_t narrowed(double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    int exponent = (int)((bits >> 52) & 0x7FF) - 1023 + 15;
    uint64_t fraction = bits & 0xFFFFFFFFFFFFF;
    uint64_t result;
    if (exponent == 0x7FF - 1023 + 15) { /* infinity, or not a number */
        result = 0x7C00 | (fraction ? 0x200 | fraction >> 42 : 0);
    } else if (exponent >= 31) {
        result = 0x7C00;
    } else {
        int shift = 42; /* bits that do not fit */
        if (exponent <= 0) { /* subnormal as a half */
            fraction |= 1ull << 52;
            shift = exponent < -11 ? 54 : 43 - exponent;
            exponent = 0;
        }
        result = ((uint64_t)exponent << 10) + (fraction >> shift);
        uint64_t rest = fraction & ((1ull << shift) - 1), tie = 1ull << (shift - 1);
        result += rest > tie || (rest == tie && (result & 1)); /* a carry runs into the exponent, as it should */
    }
    return (uint16_t)(result | ((bits >> 48) & 0x8000));
}

CONVERSION half __truncdfhf2(double value) {
    uint16_t bits = narrowed(value);
    half result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

#ifdef __arm__
/* Every float is a double: one rounding. */
CONVERSION uint16_t __gnu_f2h_ieee(float value) { return narrowed(value); }

CONVERSION float __gnu_h2f_ieee(uint16_t bits) {
    uint32_t exponent = (bits >> 10) & 31, fraction = bits & 1023, sign = (uint32_t)(bits & 0x8000) << 16, wide;
    if (exponent == 31) { /* infinity, or not a number */
        wide = 0x7F800000 | fraction << 13;
    } else if (exponent) {
        wide = (exponent + 127 - 15) << 23 | fraction << 13;
    } else { /* zero, or fraction * 2**-24, which float holds exactly */
        float value = (float)fraction * 0x1p-24f;
        memcpy(&wide, &value, sizeof wide);
    }
    wide |= sign;
    float result;
    memcpy(&result, &wide, sizeof result);
    return result;
}
#endif
