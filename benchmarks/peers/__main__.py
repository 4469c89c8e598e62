from benchmarks.peers.compare import main
from benchmarks.telling import refusals

if __name__ == "__main__":
    with refusals():
        main()
