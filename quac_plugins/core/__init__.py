"""The framework-free part: activations, quality functions, and putting both into hosts. Imports torch and numpy only."""
