#pragma once

namespace meddiff {

struct Moments {
  double count = 0, mean = 0, m2 = 0;

  void merge(double other_count, double other_mean, double other_m2) {  // Chan's formula
    const double delta = other_mean - mean, total = count + other_count;
    mean += delta * (other_count / total);
    m2 += other_m2 + delta * delta * (count * (other_count / total));
    count = total;
  }
};

}  // namespace meddiff
