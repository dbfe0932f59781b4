"""Recipes out of the configurations of other trainers: axolotl, LLaMA-Factory, TRL, alignment-handbook, torchtune."""
