"""Parts of `tools.pretrain_teacher`: the masked autoencoder, its photographs, its probes."""
