#include "pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

Cursor g_cursors[3][kMaxThreads];

namespace {

#if defined(__x86_64__) || defined(__i386__)
inline void relax() { __builtin_ia32_pause(); }
#else
inline void relax() { std::atomic_signal_fence(std::memory_order_seq_cst); }
#endif

// Long enough for the host's work between two steps to pass unnoticed, short enough to leave the core to others.
constexpr int kSpinsBeforeParking = 4000;
// A member that waits this long was overtaken by another program: let it run.
constexpr int kSpinsBeforeYielding = 20000;

void park(std::atomic<uint32_t>& word, uint32_t seen) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}
void wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, kMaxThreads, nullptr, nullptr, 0);
}

using Clock = std::chrono::steady_clock;
// How long a worker may not run before the others go on without it. On a calm machine longer than one turn of another
// program, or of the host's: such pauses come and go, and a long step alone costs far more. Shortly after one that did
// last, no longer than any item of a decode step.
constexpr auto kPatience = std::chrono::milliseconds(4);
constexpr auto kPatienceInTrouble = std::chrono::milliseconds(1);
constexpr auto kTrouble = std::chrono::milliseconds(250);
constexpr auto kLook = std::chrono::microseconds(500);
constexpr auto kFirstRest = std::chrono::milliseconds(5);
constexpr auto kLeastRest = std::chrono::milliseconds(25);
constexpr auto kMostRest = std::chrono::milliseconds(1000);

// Thrown out of a barrier to end a member's part in the function.
struct SentHome {};

}  // namespace

struct Team {
  static uint32_t& generation_of(Member& member) { return member.generation_; }

  std::mutex turn;  // held while a function runs or the team changes
  int size = 1;
  bool pin = false;
  pid_t process = 0;
  std::vector<std::thread> workers;
  void (*function)(void*, Member&) = nullptr;
  void* argument = nullptr;
  alignas(64) std::atomic<uint32_t> generation{0};
  alignas(64) std::atomic<int> parked{0};
  alignas(64) std::atomic<bool> stopping{false};
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<uint32_t> phase{0};
  std::atomic<bool> held_up{false};          // member 0 saw that a worker does not get to run
  std::atomic<uint32_t> dismissed{~0u};      // the generation whose workers were sent home
  Clock::time_point alone_until{};           // until then member 0 works alone
  Clock::time_point trouble_until{};         // until then the machine is not calm
  Clock::duration rest = kLeastRest;
  bool in_trouble() const { return Clock::now() < trouble_until; }
};

namespace {

// Never destroyed: worker threads may outlive static destructors.
Team& team() {
  static Team* instance = new Team;
  return *instance;
}

void clear_cursors(int size) {
  for (auto& set : g_cursors)
    for (int i = 0; i < size; i++) set[i].next.store(0, std::memory_order_relaxed);
}

void work(int id, uint32_t seen) {
  Team& t = team();
  for (;;) {
    for (int spins = 0; t.generation.load(std::memory_order_acquire) == seen; spins++) {
      if (spins < kSpinsBeforeParking) {
        relax();
        continue;
      }
      t.parked.fetch_add(1);
      park(t.generation, seen);
      t.parked.fetch_sub(1);
    }
    seen++;
    if (t.stopping.load(std::memory_order_acquire)) return;
    Member member;
    member.id = id;
    member.size = t.size;
    Team::generation_of(member) = seen;
    try {
      t.function(t.argument, member);
      member.barrier();
    } catch (const SentHome&) {
    }
  }
}

// Processor time that the workers have had, in nanoseconds.
int64_t worked(Team& t) {
  int64_t total = 0;
  for (auto& worker : t.workers) {
    clockid_t clock;
    timespec time;
    if (pthread_getcpuclockid(worker.native_handle(), &clock) == 0 && clock_gettime(clock, &time) == 0)
      total += time.tv_sec * 1000000000ll + time.tv_nsec;
  }
  return total;
}

// Watches the workers while member 0 waits for them: a long item keeps them running, another program does not.
class Watch {
 public:
  explicit Watch(const Team& t) : patience_(t.in_trouble() ? kPatienceInTrouble : kPatience) {}
  void look(Team& t) {
    auto now = Clock::now();
    if (now - since_ < (sampled_ ? Clock::duration(kLook) : patience_)) return;
    int64_t total = worked(t);
    if (sampled_) {
      double elapsed = std::chrono::duration<double, std::nano>(now - since_).count();
      double wanted = elapsed * ((double)t.workers.size() - 0.5);
      if ((double)(total - before_) < wanted) t.held_up.store(true, std::memory_order_relaxed);
    }
    sampled_ = true;
    before_ = total;
    since_ = now;
  }

 private:
  Clock::duration patience_;
  Clock::time_point since_ = Clock::now();
  bool sampled_ = false;
  int64_t before_ = 0;
};

void announce(Team& t) {
  t.generation.fetch_add(1);
  if (t.parked.load() > 0) wake_all(t.generation);
}

void stop_workers(Team& t) {
  if (t.workers.empty()) return;
  t.stopping.store(true);
  announce(t);
  for (auto& worker : t.workers) worker.join();
  t.workers.clear();
  t.stopping.store(false);
}

void pin_to(std::thread& thread, int index, const cpu_set_t& allowed) {
  int count = CPU_COUNT(&allowed), wanted = index % count;
  for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
    if (!CPU_ISSET(cpu, &allowed) || wanted-- > 0) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    pthread_setaffinity_np(thread.native_handle(), sizeof one, &one);
    return;
  }
}

void start_workers(Team& t) {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  bool known = sched_getaffinity(0, sizeof allowed, &allowed) == 0 && CPU_COUNT(&allowed) > 0;
  for (int id = 1; id < t.size; id++) {
    t.workers.emplace_back(work, id, t.generation.load());
    if (t.pin && known) pin_to(t.workers.back(), id, allowed);
  }
  t.process = getpid();
}

// A forked child has no worker threads: forget the parent's and start its own.
void heal_after_fork(Team& t) {
  if (t.process == getpid() || t.size == 1) return;
  for (auto& worker : t.workers) worker.detach();
  t.workers.clear();
  t.arrived.store(0);
  t.parked.store(0);
  start_workers(t);
}

}  // namespace

void Member::barrier() {
  if (size == 1) return;
  Team& t = team();
  uint32_t phase = t.phase.load(std::memory_order_relaxed);
  if (t.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
    t.arrived.store(0, std::memory_order_relaxed);
    if (t.held_up.load(std::memory_order_relaxed)) t.dismissed.store(generation_, std::memory_order_relaxed);
    t.phase.store(phase + 1, std::memory_order_release);
  } else {
    Watch watch(t);
    for (int spins = 0; t.phase.load(std::memory_order_acquire) == phase; spins++) {
      if (spins < kSpinsBeforeYielding) relax();
      else sched_yield();
      if (id == 0 && (spins >= kSpinsBeforeYielding || spins % 1024 == 1023)) watch.look(t);
    }
  }
  if (t.dismissed.load(std::memory_order_relaxed) != generation_) return;
  if (id != 0) throw SentHome{};
  size = 1;
}

void run_team(void (*function)(void*, Member&), void* argument) {
  Team& t = team();
  std::lock_guard<std::mutex> lock(t.turn);
  heal_after_fork(t);
  clear_cursors(t.size);
  Member member;
  member.id = 0;
  member.size = t.size;
  if (t.size > 1 && Clock::now() < t.alone_until) member.size = 1;
  if (member.size > 1) {
    t.function = function;
    t.argument = argument;
    t.held_up.store(false, std::memory_order_relaxed);
    announce(t);
    Team::generation_of(member) = t.generation.load(std::memory_order_relaxed);
  }
  bool together = member.size > 1;
  function(argument, member);
  member.barrier();
  if (!together) return;
  bool alone = member.size == 1;  // sent the others home on the way: rest, longer each time it happens again
  t.rest = alone ? std::min<Clock::duration>(2 * t.rest, kMostRest) : std::max<Clock::duration>(t.rest / 2, kLeastRest);
  if (!alone) return;
  t.alone_until = Clock::now() + (t.in_trouble() ? t.rest : kFirstRest);
  t.trouble_until = t.alone_until + kTrouble;
}

void set_team_size(int threads, bool pin) {
  if (threads < 1) threads = 1;
  if (threads > kMaxThreads) threads = kMaxThreads;
  Team& t = team();
  std::lock_guard<std::mutex> lock(t.turn);
  heal_after_fork(t);
  if (threads == t.size && pin == t.pin) return;
  stop_workers(t);
  t.size = threads;
  t.pin = pin;
  start_workers(t);
}

int team_size() { return team().size; }
