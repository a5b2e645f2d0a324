"""What runs inside the processes that judge: the walls around them, the parent that forks, the user's function.

The standard library only, and what a verifier itself needs: nothing here imports the rest of this project, Ray or
torch.
"""
