package org.graphwright

import java.nio.ByteBuffer
import java.nio.ByteOrder

/** An input or output: dense and row-major. */
class Tensor(val name: String, val dtype: String, val shape: LongArray, val bytes: Long) {
    /** A direct buffer of its size, in native byte order. */
    fun allocate(): ByteBuffer = ByteBuffer.allocateDirect(bytes.toInt()).order(ByteOrder.nativeOrder())
}

/** The model of this module. `run` may be called from several threads at once. */
class Model(threads: Int = 0) : AutoCloseable {
    private var handle: Long = create(threads)

    val inputs: List<Tensor> = tensors(false)
    val outputs: List<Tensor> = tensors(true)

    /** Run on direct buffers, one for each of `inputs`; the results are new ones, or those given. */
    fun run(given: List<ByteBuffer>, results: List<ByteBuffer> = outputs.map { it.allocate() }): List<ByteBuffer> {
        check(handle != 0L) { "the model is closed" }
        call(handle, given.toTypedArray(), results.toTypedArray())
        return results
    }

    override fun close() {
        destroy(handle)
        handle = 0L
    }

    private fun tensors(output: Boolean): List<Tensor> =
        List(count(output)) { Tensor(name(output, it), dtype(output, it), shape(output, it), bytes(output, it)) }

    companion object {
        init {
            System.loadLibrary("graphwright_jni")
        }

        @JvmStatic private external fun create(threads: Int): Long
        @JvmStatic private external fun destroy(model: Long)
        @JvmStatic private external fun count(output: Boolean): Int
        @JvmStatic private external fun name(output: Boolean, index: Int): String
        @JvmStatic private external fun dtype(output: Boolean, index: Int): String
        @JvmStatic private external fun shape(output: Boolean, index: Int): LongArray
        @JvmStatic private external fun bytes(output: Boolean, index: Int): Long
        @JvmStatic private external fun call(model: Long, inputs: Array<ByteBuffer>, outputs: Array<ByteBuffer>)
    }
}
