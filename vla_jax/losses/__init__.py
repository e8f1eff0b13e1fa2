"""What is optimised: one named term a file, put together by `objective`."""
