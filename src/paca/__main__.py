"""`python -m paca`, the program where its folder is not on the path. `import paca` comes first: seconds more."""

from paca_command import main

if __name__ == "__main__":
    main()
