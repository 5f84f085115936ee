"""A few queries, demonstrations and verdicts."""
from tasks.queries import builtin, demonstrations

if __name__ == "__main__":
    for query in builtin("rl", 12):
        print(f"[{query['domain']}] {query['prompt']}\n    {query['check']}")
    for row in demonstrations(8):
        print("\n".join(f"{m['role']}: {m['content']}" for m in row["messages"]) + "\n")
