"""The tf.data side of `benchmarks.readers`: run by a Python that has TensorFlow, it prints frames per second and
the CPU time a frame in microseconds, over all of its threads.

    python tf_reader.py GLOB THREADS BATCH_SIZE BATCHES CHUNK

A pipeline as Open X-Embodiment trainers build it: shards interleaved, episodes cut into steps with their chunk of
actions, a shuffle buffer of encoded steps, decoding, batches, prefetch. TensorFlow may use THREADS threads.
"""

import sys
import time

import tensorflow as tf

BUFFER = 2000  # steps


def pipeline(pattern: str, threads: int, batch_size: int, chunk: int) -> tf.data.Dataset:
    """An endless dataset of batches with picture, state, and actions [B, chunk, 7]."""
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    spec = {
        "steps/observation/image_0": tf.io.VarLenFeature(tf.string),
        "steps/observation/state": tf.io.VarLenFeature(tf.float32),
        "steps/action": tf.io.VarLenFeature(tf.float32),
    }

    def steps(record):
        episode = {name: tf.sparse.to_dense(value) for name, value in tf.io.parse_single_example(record, spec).items()}
        actions = tf.reshape(episode["steps/action"], (-1, 7))
        count = tf.shape(actions)[0]
        ahead = tf.minimum(tf.range(count)[:, None] + tf.range(chunk)[None], count - 1)
        state = tf.reshape(episode["steps/observation/state"], (-1, 7))
        return tf.data.Dataset.from_tensor_slices(
            {"image": episode["steps/observation/image_0"], "state": state, "actions": tf.gather(actions, ahead)}
        )

    def decode(step):
        return {**step, "image": tf.io.decode_jpeg(step["image"], channels=3)}

    files = tf.data.Dataset.list_files(pattern, shuffle=True, seed=0).repeat()
    records = files.interleave(tf.data.TFRecordDataset, cycle_length=4, num_parallel_calls=threads)
    data = records.interleave(steps, cycle_length=4, num_parallel_calls=threads).shuffle(BUFFER, seed=0)
    data = data.map(decode, num_parallel_calls=threads).batch(batch_size, drop_remainder=True).prefetch(4)
    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    return data.with_options(options)


def main() -> None:
    """Reads BATCHES batches after a quarter as many to warm up."""
    pattern, (threads, batch_size, batches, chunk) = sys.argv[1], map(int, sys.argv[2:])
    stream = pipeline(pattern, threads, batch_size, chunk).as_numpy_iterator()
    for _ in range(max(batches // 4, 2)):
        next(stream)
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(batches):
        next(stream)
    frames = batches * batch_size
    print(frames / (time.perf_counter() - start), 1e6 * (time.process_time() - cpu) / frames)


if __name__ == "__main__":
    main()
