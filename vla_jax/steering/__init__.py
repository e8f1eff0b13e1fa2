"""Steering a frozen policy by a reward written from language: keypoints, checked programs, the closed loop."""
