/* Conversions that LLVM asks its own run-time library for, where the processor has no instruction for them. */
#include <stdint.h>
#include <string.h>

/* double to half in one rounding, to nearest and ties to even; through float it would be two. */
_Float16 __truncdfhf2(double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    int exponent = (int)((bits >> 52) & 0x7FF) - 1023 + 15;
    uint64_t fraction = bits & 0xFFFFFFFFFFFFF;
    uint64_t half;
    if (exponent == 0x7FF - 1023 + 15) { /* infinity, or not a number */
        half = 0x7C00 | (fraction ? 0x200 | fraction >> 42 : 0);
    } else if (exponent >= 31) {
        half = 0x7C00;
    } else {
        int shift = 42; /* bits that do not fit */
        if (exponent <= 0) { /* subnormal as a half */
            fraction |= 1ull << 52;
            shift = exponent < -11 ? 54 : 43 - exponent;
            exponent = 0;
        }
        half = ((uint64_t)exponent << 10) + (fraction >> shift);
        uint64_t rest = fraction & ((1ull << shift) - 1), tie = 1ull << (shift - 1);
        half += rest > tie || (rest == tie && (half & 1)); /* a carry runs into the exponent, as it should */
    }
    uint16_t result = (uint16_t)(half | ((bits >> 48) & 0x8000));
    _Float16 narrowed;
    memcpy(&narrowed, &result, sizeof narrowed);
    return narrowed;
}
