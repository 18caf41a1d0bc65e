"""Teacher, transfer, tube operator, tokenizers, 3D vision transformer, decoders, sliding window."""
