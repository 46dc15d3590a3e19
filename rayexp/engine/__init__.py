"""The engine: plain PyTorch, no Ray. The same bits at any number of workers.

The number of workers may decide who computes a shard, never what the shard is, nor in which order shards are added.

    trainer      epochs and steps as a generator
    step         one optimizer step: shards on replicas, the tree, the exchange, the update
    inputs       what a step is told
    passes       which shards go through the model at once
    gpu          streams, captured graphs, data that come in the background
    replica      the copy of the model and the buffers with which one thread (or GPU) computes shards
    gradients    a model's tensors as views of flat buffers; the gradient buffer
    reduction    the fixed tree over shards
    exchange     what travels between workers to complete the tree
    group        the workers of a run as one group
    optimizer    SGD and AdamW on the flat buffers
    schedule     the learning rate as a function of the step
    own_rules    an update rule and a schedule of the user's own
    starting     weights to start from; freezing: parameters that stay as they are
    order        the order of samples, and the key of every random draw
    rng          dropout whose mask is drawn per shard
    batch_norm   batch norm over each shard of a pass
    rounding     which weights are rounded to bfloat16 once a step
    cpu/         what makes a CPU fast, off with one switch
    evaluate     validation predictions, cut into streams
    checkpoint   the state as bytes and back; hashes
    runtime      device, threads, replicas, determinism
    settings     PyTorch's global settings, pinned and given back
    fingerprint  what bits depend on, and a probe of it
    contract/    what a model must keep to, tried before the first step and watched in it
    workload     the protocol that a workload implements
    link         the speed of the link between workers
    summary      the layer table
    portable     a trained model outside of rayexp
    diagnosis    why a validation loss makes no sense while the training loss does
"""
