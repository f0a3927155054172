/* The text of the calling thread's last error, as errno is one number of each thread. */
#include "internal.h"

#include <string.h>

_Thread_local char message[MESSAGE_BYTES];

void say(const char *text) {
    size_t length = strlen(text);
    if (length >= sizeof message) length = sizeof message - 1;
    memcpy(message, text, length);
    message[length] = 0;
}

void say_more(const char *text) {
    size_t used = strlen(message);
    for (; *text && used + 1 < sizeof message; text++) message[used++] = *text;
    message[used] = 0;
}

void say_number(int64_t value) {
    char digits[24], *end = digits + sizeof digits - 1, *first = end;
    uint64_t rest = value < 0 ? -(uint64_t)value : (uint64_t)value;
    *end = 0;
    do *--first = (char)('0' + rest % 10);
    while (rest /= 10);
    if (value < 0) *--first = '-';
    say_more(first);
}
