"""Closed-loop evaluation: batched rollouts in one program, intervals, videos and the report."""
