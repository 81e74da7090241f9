// A team of threads that runs one function at a time together, with barriers and shared loops inside it.
#pragma once
#include <atomic>
#include <cstdint>

constexpr int kMaxThreads = 256;

// What each member of the team sees while the function runs.
class Member {
 public:
  int id;
  int size;
  // Waits until every member is here. Where another program keeps a member from running, the others are sent home
  // once it arrives (they leave the function by an exception) and member 0 goes on alone, with size 1.
  void barrier();
  // Calls body(i) for every i in [0, count) once over the team; neighbours go to the same member while it keeps up.
  // Every member calls it with the same count; `barrier()` must separate it from what depends on it and from the next.
  template <class Body>
  void each(int64_t count, const Body& body);

 private:
  friend struct Team;
  uint32_t loop_ = 0;
  uint32_t generation_ = 0;
};

// Ranges handed out by `each`: three sets in turn, so that a member clears the next while the others may still steal
// from the current one.
struct alignas(64) Cursor {
  std::atomic<int64_t> next{0};
};
extern Cursor g_cursors[3][kMaxThreads];

template <class Body>
void Member::each(int64_t count, const Body& body) {
  Cursor* cursors = g_cursors[loop_ % 3];
  g_cursors[(loop_ + 1) % 3][id].next.store(0, std::memory_order_relaxed);
  loop_++;
  for (int turn = 0; turn < size; turn++) {
    int owner = id + turn < size ? id + turn : id + turn - size;
    int64_t begin = count * owner / size, length = count * (owner + 1) / size - begin;
    for (;;) {
      int64_t i = cursors[owner].next.fetch_add(1, std::memory_order_relaxed);
      if (i >= length) break;
      body(begin + i);
    }
  }
}

// Runs function(argument, member) on every member; the calling thread is member 0. Calls from several threads take
// turns. Nested calls are not allowed.
void run_team(void (*function)(void*, Member&), void* argument);
void set_team_size(int threads, bool pin);
int team_size();

template <class Function>
void run_team(Function& function) {
  run_team([](void* argument, Member& member) { (*static_cast<Function*>(argument))(member); }, &function);
}
