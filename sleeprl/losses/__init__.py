"""Pure tensor functions: policy gradient, distillation, off-policy correction. Never imports ray."""
