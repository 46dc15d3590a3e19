"""The engine: plain PyTorch, no Ray. The same bits at any number of workers.

The number of workers may decide who computes a shard, never what the shard is, nor in which order shards are added.

    order       which sample comes when, and where every random draw comes from
    draws       dropout whose mask is drawn per shard
    norm        batch norm over each shard of a pass
    shardwise   several shards in one pass, each with gradients of its own
    taps        a convolution's weight gradient on small maps
    matmul      matrix products on the CPU
    flat        a model's tensors as views of one buffer; the layout of what is reduced
    reduce      the fixed tree over shards
    group       the workers of a run as one group
    exchange    what travels between workers to complete the tree
    optimize    SGD and AdamW on the flat buffers; schedules
    place       device, threads, lanes, determinism
    fingerprint what bits depend on, and a probe of it
    contract    what a model must keep to, watched during the first step
    lane        what a thread of a worker needs to compute shards
    step        one optimizer step: shards on lanes, then the tree, then the update
    evaluate    validation predictions, cut into streams
    checkpoint  state to bytes and back, hashes
    link        how fast the workers' link is
    summary     the layer table
    loop        epochs and steps as a generator
"""
