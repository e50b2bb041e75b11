"""What an evaluation computes with beside arrays: low-rank weights and values made later."""
