"""The parts of the stages that run a model: prompts, lm-eval and its backends, comparisons, standard errors."""
