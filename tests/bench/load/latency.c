/* A histogram of latencies: 32 steps for each power of two of nanoseconds, so that a percentile is right to 3 %, and a
 * million of them costs what one does. */
#include "load.h"

#define STEPS 32

static uint64_t counts[64 * STEPS], measured;
static double longest;

void note(double seconds)
{
    uint64_t ns = seconds > 0 ? (uint64_t)(seconds * 1e9) : 0;
    int power = ns < STEPS ? 0 : 63 - __builtin_clzll(ns) - 4; /* ns >> (power - 1) is from STEPS to 2 STEPS - 1 */
    counts[power ? power * STEPS + (ns >> (power - 1)) - STEPS : ns]++;
    measured++;
    if (seconds > longest)
        longest = seconds;
}

void forget(void)
{
    memset(counts, 0, sizeof counts);
    measured = 0;
    longest = 0;
}

uint64_t noted(void)
{
    return measured;
}

static double percentile(double part)
{
    uint64_t wanted = (uint64_t)(part * measured), seen = 0;
    for (int i = 0; i < 64 * STEPS; i++)
        if ((seen += counts[i]) > wanted) {
            int power = i / STEPS;
            return (power ? ((uint64_t)(i % STEPS) + STEPS) << (power - 1) : (uint64_t)i) / 1e9;
        }
    return longest;
}

void print_latencies(void)
{
    printf("\"count\": %lu, \"p50\": %.9f, \"p90\": %.9f, \"p99\": %.9f, \"p999\": %.9f, \"max\": %.9f", measured,
        percentile(0.5), percentile(0.9), percentile(0.99), percentile(0.999), longest);
}
