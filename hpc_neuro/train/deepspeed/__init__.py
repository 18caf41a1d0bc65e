"""DeepSpeed: the engine, its configuration, its shards and what they hold. The only folder that imports deepspeed."""
