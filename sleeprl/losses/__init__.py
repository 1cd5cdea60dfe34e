"""Pure tensor functions: policy gradient, distillation, advantages, correction. Never imports ray."""
