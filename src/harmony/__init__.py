"""Pre-training of image encoders on image-caption pairs, and their evaluation."""
