"""Evaluation: batched rollouts in one program, measures of listening, intervals, videos and the report."""
