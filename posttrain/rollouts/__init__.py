"""Online RL around TRL's trainers: what samples the completions, their seeds, and what is checked of them."""
