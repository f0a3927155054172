/* The calls of Model.kt over those of graphwright.h. Tensors are direct ByteBuffers in native byte order. */
#include "graphwright.h"

#include <jni.h>
#include <stdlib.h>

static void fail(JNIEnv *env, const char *kind, const char *text) {
    jclass type = (*env)->FindClass(env, kind);
    if (type) (*env)->ThrowNew(env, type, text);
}

static const graphwright_tensor *tensor_at(jboolean output, jint index) {
    const graphwright_tensor *tensors;
    int count = output ? graphwright_outputs(&tensors) : graphwright_inputs(&tensors);
    return index >= 0 && index < count ? &tensors[index] : NULL;
}

JNIEXPORT jlong JNICALL Java_org_graphwright_Model_create(JNIEnv *env, jclass type, jint threads) {
    (void)type;
    graphwright_model *model;
    if (graphwright_init(NULL, threads, &model)) {
        fail(env, "java/lang/IllegalStateException", graphwright_error());
        return 0;
    }
    return (jlong)(intptr_t)model;
}

JNIEXPORT void JNICALL Java_org_graphwright_Model_destroy(JNIEnv *env, jclass type, jlong model) {
    (void)env, (void)type;
    graphwright_free((graphwright_model *)(intptr_t)model);
}

JNIEXPORT jint JNICALL Java_org_graphwright_Model_count(JNIEnv *env, jclass type, jboolean output) {
    (void)env, (void)type;
    return output ? graphwright_outputs(NULL) : graphwright_inputs(NULL);
}

JNIEXPORT jstring JNICALL Java_org_graphwright_Model_name(JNIEnv *env, jclass type, jboolean output, jint index) {
    (void)type;
    const graphwright_tensor *tensor = tensor_at(output, index);
    return tensor ? (*env)->NewStringUTF(env, tensor->name) : NULL;
}

JNIEXPORT jstring JNICALL Java_org_graphwright_Model_dtype(JNIEnv *env, jclass type, jboolean output, jint index) {
    (void)type;
    const graphwright_tensor *tensor = tensor_at(output, index);
    return tensor ? (*env)->NewStringUTF(env, tensor->dtype) : NULL;
}

JNIEXPORT jlongArray JNICALL Java_org_graphwright_Model_shape(JNIEnv *env, jclass type, jboolean output, jint index) {
    (void)type;
    const graphwright_tensor *tensor = tensor_at(output, index);
    jlongArray shape = tensor ? (*env)->NewLongArray(env, tensor->rank) : NULL;
    if (shape) (*env)->SetLongArrayRegion(env, shape, 0, tensor->rank, (const jlong *)tensor->shape);
    return shape;
}

JNIEXPORT jlong JNICALL Java_org_graphwright_Model_bytes(JNIEnv *env, jclass type, jboolean output, jint index) {
    (void)env, (void)type;
    const graphwright_tensor *tensor = tensor_at(output, index);
    return tensor ? (jlong)tensor->bytes : 0;
}

/* The addresses of direct buffers of the right sizes; NULL with an exception where one is not. */
static void **addresses(JNIEnv *env, jobjectArray buffers, jboolean output) {
    int count = output ? graphwright_outputs(NULL) : graphwright_inputs(NULL);
    if ((*env)->GetArrayLength(env, buffers) != count) {
        fail(env, "java/lang/IllegalArgumentException", "one buffer for each input, and one for each output");
        return NULL;
    }
    void **found = calloc((size_t)count + 1, sizeof *found);
    for (int i = 0; found && i < count; i++) {
        jobject buffer = (*env)->GetObjectArrayElement(env, buffers, i);
        found[i] = buffer ? (*env)->GetDirectBufferAddress(env, buffer) : NULL;
        if (!found[i] || (*env)->GetDirectBufferCapacity(env, buffer) != (jlong)tensor_at(output, i)->bytes) {
            fail(env, "java/lang/IllegalArgumentException", "a buffer is not direct, or not of its tensor's size");
            free(found);
            return NULL;
        }
        (*env)->DeleteLocalRef(env, buffer);
    }
    if (!found) fail(env, "java/lang/OutOfMemoryError", "no memory for addresses");
    return found;
}

JNIEXPORT void JNICALL Java_org_graphwright_Model_call(JNIEnv *env, jclass type, jlong model, jobjectArray inputs,
                                                       jobjectArray outputs) {
    (void)type;
    void **given = addresses(env, inputs, JNI_FALSE);
    void **results = given ? addresses(env, outputs, JNI_TRUE) : NULL;
    if (results && graphwright_run((graphwright_model *)(intptr_t)model, (const void *const *)given, results))
        fail(env, "java/lang/IllegalStateException", graphwright_error());
    free(given), free(results);
}
