"""Parts of `tools.teacher.pretrain`: the masked autoencoder, its photographs, its probes."""
